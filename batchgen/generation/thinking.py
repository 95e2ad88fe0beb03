"""What a model thinks before it answers, followed token by token: whether a row is inside of it, and how long it is.

A row thinks from the start mark, or from its first token where the prompt has opened the thinking, to the first end
mark. The start mark counts only where nothing but white space is before it; what comes later is answer. Marks that are
one token of the vocabulary are found by it, others in the text of the last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Thinking

_MARGIN = 8  # tokens beside those of a mark: parts of characters, tokens without text
_MOST_WHITE_SPACE = 16  # tokens before a start mark


def find_ids(mark: str, tokenizer: HfTokenizer) -> list[int]:
    """Returns the tokens of a mark; a single one where the vocabulary has it."""
    ids = list(tokenizer.tokenize([mark], special=False)[0])
    # Some tokenizers put a space before it.
    return next(([token] for token in ids if tokenizer.token_text(token) == mark), ids)


class ThinkingState:
    """Where one row is in its thinking.

    Attributes:
        is_inside: the next token is thought.
        is_over: the thinking has ended, or there is none: all that follows is answer.
        tokens: how many were thought; those of the marks are not counted.
        answer_begin: how many tokens come before the answer; meaningful once `is_over`.
    """

    def __init__(self, thinking: Thinking, tokenizer: HfTokenizer) -> None:
        self._thinking, self._tokenizer = thinking, tokenizer
        self.start_ids = find_ids(thinking.start, tokenizer)
        self.end_ids = find_ids(thinking.end, tokenizer)
        self.is_inside, self.is_over = thinking.is_open, False
        self.tokens = self.answer_begin = 0
        self._count = 0  # of all tokens
        self._recent: list[int] = []  # the tokens since the start, or since the thinking began

    def append(self, token: int) -> None:
        """Takes the next token of the row."""
        self._count += 1
        if self.is_over:
            return
        self._recent.append(token)
        if self.is_inside:
            self.tokens += 1
            if self._has_ended(token):
                self.close()
        else:
            self._look_for_start()

    def open(self) -> None:
        """Says that the next token is thought."""
        self.is_inside, self._recent = True, []

    def close(self) -> None:
        """Says that the answer begins with the next token."""
        if self.is_inside:
            self.tokens = max(0, self.tokens - len(self.end_ids))
        self.is_inside, self.is_over, self.answer_begin = False, True, self._count

    def find_rest_of_end(self) -> list[int]:
        """Returns the tokens that are missing to the end mark, of which some may have been generated already."""
        for done in range(min(len(self.end_ids) - 1, len(self._recent)), 0, -1):
            if self._recent[-done:] == self.end_ids[:done]:
                return self.end_ids[done:]
        return self.end_ids

    def _has_ended(self, token: int) -> bool:
        if len(self.end_ids) == 1:
            return token == self.end_ids[0]
        return self._thinking.end in self._text(self._recent[-(len(self._thinking.end.encode()) + _MARGIN) :])

    def _look_for_start(self) -> None:
        start, text = self._thinking.start, self._text(self._recent).lstrip()
        if self._recent[-len(self.start_ids) :] == self.start_ids or text.startswith(start):
            self.open()
        elif not start.startswith(text) or len(self._recent) >= len(self.start_ids) + _MOST_WHITE_SPACE:
            self.is_over, self.answer_begin = True, 0

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def follow(thinking: Thinking, tokens: Sequence[int], tokenizer: HfTokenizer) -> ThinkingState:
    """Returns where a row is behind these tokens."""
    state = ThinkingState(thinking, tokenizer)
    for token in tokens:
        state.append(token)
    return state
