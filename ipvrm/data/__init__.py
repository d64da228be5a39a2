"""Rows of text, their tokens and packed batches: the only place that renders chat, shifts, pads or masks."""
