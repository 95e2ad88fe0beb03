"""The thinking of a row that has a budget for it, or a constraint, which begins with the answer.

Once as many tokens were thought as the budget has, those of the end mark are forced, one a step. Where the prompt has
not opened the thinking, the first token of a row with a constraint is the constraint's or begins the start mark, whose
other tokens are then forced. A start mark that the constraint itself might begin with, since its first token is neither
the whole mark nor a special token, is not offered.
"""

from __future__ import annotations

from batchgen.generation.thinking import ThinkingState
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Thinking


class ThinkingRow:
    """Follows a row, and says which token has to come next.

    Args:
        thinking: the marks of its model.
        tokenizer: the model's.
        budget: the most tokens that it may think; None: there is none.
        is_constrained: the answer has a constraint.

    Attributes:
        state: where the row is.
    """

    def __init__(self, thinking: Thinking, tokenizer: HfTokenizer, budget: int | None, is_constrained: bool) -> None:
        self.state = ThinkingState(thinking, tokenizer)
        self._budget, self._is_constrained = budget, is_constrained
        self._forced: list[int] = []
        self._is_new = True
        start = self.state.start_ids
        self._can_offer = len(start) == 1 or (bool(start) and start[0] in tokenizer.special_tokens.values())
        self._force_end()

    @property
    def is_answer(self) -> bool:
        """Whether the next token belongs to the answer, or may."""
        return not self.state.is_inside and not self._forced

    @property
    def offered(self) -> int | None:
        """The token that may come next beside those of the constraint, and begins the thinking; None: there is none."""
        state = self.state
        can_begin = self._is_new and self._is_constrained and self._can_offer
        return state.start_ids[0] if can_begin and not state.is_inside and not state.is_over else None

    @property
    def forced(self) -> int | None:
        """The token that comes next, whatever the logits are; None: there is none."""
        return self._forced[0] if self._forced else None

    def append(self, token: int) -> bool:
        """Takes the next token of the row; returns whether it belongs to the answer."""
        state, offered = self.state, self.offered
        self._is_new = False
        if state.is_over:
            return True
        if self._is_constrained and self.is_answer and token != offered:
            state.close()
            return True
        was_inside, was_forced = state.is_inside, bool(self._forced)
        self._forced = self._forced[1:]
        state.append(token)
        if token == offered and not was_inside:
            self._forced = state.start_ids[1:]
        elif was_forced and not self._forced and state.is_inside == was_inside and not state.is_over:
            # The mark is whole, though its text was not seen: the tokenizer writes it in another way.
            state.close() if was_inside else state.open()
        self._force_end()
        return False

    def _force_end(self) -> None:
        if self._budget is None or self._forced or not self.state.is_inside:
            return
        if self.state.tokens >= self._budget:
            self._forced = self.state.find_rest_of_end()
