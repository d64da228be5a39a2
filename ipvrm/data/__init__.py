"""Rows of text, their tokens and packed batches: the only place that renders chat, shifts, pads or masks."""

from ipvrm.data.chat import Chat, encode_prompt
from ipvrm.data.responses import Response, tokenize
from ipvrm.data.rows import Row, read_prompts, read_rows

__all__ = ["Chat", "Response", "Row", "encode_prompt", "read_prompts", "read_rows", "tokenize"]
