"""Measurements behind decisions and results that are not an op's time: each is one command."""
