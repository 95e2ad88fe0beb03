"""Rows become prompts, and generations become answers."""
