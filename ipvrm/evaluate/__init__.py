"""Evaluation: step scores, ProcessBench and Best-of-N."""
