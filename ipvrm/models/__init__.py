"""Causal language models, the reward model made of two of them, and the files they are kept in."""
