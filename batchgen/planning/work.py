"""What a forecast is about: the rows of an input, or a sample of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.types import Prompt


@dataclass(frozen=True)
class Work:
    """Rows to generate: those of an input, or a sample of them. Each sample of a row is a row here."""

    lengths: Sequence[tuple[int, int]]  # prompt tokens, new tokens
    rows: int  # that these stand for
    prompt_share: float = 1.0  # of the prompts' tokens: what is left where the samples of a row share their prompt

    @classmethod
    def of(cls, prompts: Sequence[Prompt], drawn: int, total: int, bytes_per_token: int = 1) -> Work:
        """The work of rows drawn from an input.

        Args:
            prompts: of the rows that have become one.
            drawn: rows, those that have become no prompt among them.
            total: rows of the input.
            bytes_per_token: 1 where the prompts' tokens are tokens; else they are bytes, and this many make a token.
        """
        lengths: list[tuple[int, int]] = []
        own = 0
        for prompt in (each for row in prompts for each in (row, *row.others)):
            params = prompt.params
            tokens = -(-len(prompt.tokens) // bytes_per_token)
            own += tokens
            # A greedy row is generated once, and its text repeated.
            lengths += [(tokens, params.max_new_tokens)] * (params.n if params.temperature > 0 else 1)
        every = sum(tokens for tokens, _ in lengths)
        return cls(lengths, round(total * len(lengths) / max(drawn, 1)), own / every if every else 1.0)
