"""Responses and their labels: generation, verification, and the files between them."""
