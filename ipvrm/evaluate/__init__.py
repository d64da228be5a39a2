"""Evaluation: step scores, ProcessBench and Best-of-N (method, section 4)."""
