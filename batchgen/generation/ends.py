"""Where a row ends: an end of sequence, a stop token, its length or a stop text.

After each token they are looked for in vLLM's order: the end of sequence (unless `ignore_eos`), `stop_token_ids`, the
length; then stop texts, which end a row at its length, too. Of stop texts that one token completes, the one that is
whole first counts, and of those the first in the list. Stop texts are not looked for before `min_tokens`, and are
asleep while the model thinks: they are parts of the answer. A row whose constraint is fulfilled ends, too, which
`TokenChooser.is_complete` says, not this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.generation.thinking import ThinkingState
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import FinishReason, Prompt

# A tail of tokens can begin in the middle of a character and may hold tokens without text (special ones).
_TAIL_MARGIN = 8


@dataclass(frozen=True, slots=True)
class End:
    """Why a row has ended."""

    reason: FinishReason
    stop_reason: int | str | None = None  # the id in `stop_token_ids`, or the stop text, that ended it


LENGTH = End("length")
STOP = End("stop")
"""By an end of sequence, or because nothing can follow what a constraint allows."""


def needs_tokens(prompt: Prompt) -> bool:
    """Returns whether more than its length and the model's ends of sequence can end a row, or less."""
    params = prompt.params
    return bool(params.stop or params.stop_token_ids or params.ignore_eos)


class EndFinder:
    """Finds where one row ends, token by token.

    Args:
        prompt: the row.
        tokenizer: the model's.

    Attributes:
        tokens: generated so far.
    """

    def __init__(self, prompt: Prompt, tokenizer: HfTokenizer) -> None:
        self._params, self._tokenizer = prompt.params, tokenizer
        params = prompt.params
        self._ends = frozenset(() if params.ignore_eos else tokenizer.end_tokens)
        # Special tokens have no text in the output, yet people name them: stop=["<|im_end|>"].
        names = tokenizer.special_tokens
        self._special = {names[stop]: stop for stop in reversed(params.stop) if stop in names}
        # A token with text has at least one byte, so a stop text of n bytes lies within n tokens.
        longest = max((len(stop.encode("utf-8", "surrogatepass")) for stop in params.stop), default=0)
        self._tail = longest + _TAIL_MARGIN
        thinking = prompt.markup.thinking if prompt.markup is not None else None
        self._thinking = ThinkingState(thinking, tokenizer) if thinking is not None and params.stop else None
        self.tokens: list[int] = []

    def append(self, token: int) -> End | None:
        """Takes the next token; returns why the row ends with it; None: it goes on."""
        self.tokens.append(token)
        if self._thinking is not None:
            self._thinking.append(token)
        if token in self._ends:
            return STOP
        if token in self._params.stop_token_ids:
            return End("stop", token)
        stop = self._find_stop_text(token)
        if stop is not None:
            return End("stop", stop)
        return LENGTH if len(self.tokens) >= self._params.max_new_tokens else None

    def _find_stop_text(self, token: int) -> str | None:
        params, begin = self._params, 0
        if not params.stop or len(self.tokens) <= params.min_tokens:
            return None
        if self._thinking is not None:
            if self._thinking.is_inside:
                return None
            begin = self._thinking.answer_begin
        if token in self._special:
            return self._special[token]
        answer = self.tokens[begin:]
        if not answer:  # the token ends the thinking
            return None
        found = find_stop(self._decode(answer[-self._tail :]), self._decode(answer[-self._tail : -1]), params.stop)
        return None if found is None else found[1]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._params.skip_special_tokens)


def find_stop(text: str, before: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Finds the stop text that the last token of a text completes.

    Args:
        text: with that token.
        before: without it.
        stops: what is looked for.

    Returns:
        The place in `text` where the stop text begins that is whole first, and the stop text; None: there is none.
    """
    # What one token adds may complete a character before it.
    old = len(before.rstrip("\ufffd"))
    found = [
        (place + len(stop), number, place)
        for number, stop in enumerate(stops)
        if (place := text.find(stop, max(0, old - len(stop) + 1))) >= 0
    ]
    if not found:
        return None
    _, number, place = min(found)
    return place, stops[number]
