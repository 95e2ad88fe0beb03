"""Prompts that are refused while others are generated: for now those that do not fit into memory."""

from __future__ import annotations

from batchgen.types import Generation, Prompt


def refuse(prompt: Prompt) -> Generation:
    """Returns the failed generation of a prompt for which there is not enough memory, even alone in a batch."""
    return Generation.failed(
        prompt,
        "out_of_memory",
        f"line {prompt.line}: {len(prompt.tokens)} prompt tokens and up to {prompt.params.max_new_tokens} new ones "
        "do not fit into memory, even alone in a batch. Lower max_new_tokens, shorten the prompt, "
        "or use a machine with more memory or a smaller --dtype",
    )
