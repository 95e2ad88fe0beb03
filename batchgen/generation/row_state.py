"""A row in its place: its seed, how much it has generated, and what that means for its next token."""

from __future__ import annotations

from collections.abc import Sequence

from batchgen.generation.bad_words import find_forbidden, find_sequences
from batchgen.generation.pools import Bias, BiasPool, SeenPool
from batchgen.generation.thinking_row import ThinkingRow
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt


class RowState:
    """A row that has generated some tokens.

    Args:
        place: where the row is.
        prompt: the row.
        generated: its tokens so far.
        tokenizer: of the model.
        pools: where the row takes what it needs on the device, until `end`.

    Attributes:
        generated: how many tokens have been chosen for it: with `seed`, this says what its next random numbers are.
        seed: 64 bits, as a signed number.
        bias_row, seen_row: its rows of the pools; 0 for none.
        thinking: what it thinks, where its budget or its constraint needs to know it.
        answer_tokens: those that its constraint has to follow before the first one is chosen here.
    """

    def __init__(
        self,
        place: int,
        prompt: Prompt,
        generated: Sequence[int],
        tokenizer: HfTokenizer,
        pools: tuple[SeenPool, BiasPool],
    ) -> None:
        params = prompt.params
        self.place, self.params = place, params
        self.generated = len(generated)
        self.seed = _to_signed(prompt.row_seed)
        self._end_ids = [*tokenizer.end_tokens, *params.stop_token_ids] if params.min_tokens else []
        sequences = find_sequences(params.bad_words, tokenizer) if params.bad_words else []
        self._bad_sequences = [sequence for sequence in sequences if len(sequence) > 1]
        self._tokens: list[int] = []  # kept up to date only where they are awaited
        self._seen, self._biases = pools
        forbidden = [sequence[0] for sequence in sequences if len(sequence) == 1]
        self.bias_row = self._biases.begin(_bias_of(prompt, forbidden))
        has_penalty = params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)
        self.seen_row = self._seen.begin(prompt.tokens, generated) if has_penalty else 0
        self.thinking: ThinkingRow | None = None
        thinking = prompt.markup.thinking if prompt.markup is not None else None
        if thinking is not None and (params.thinking_tokens is not None or params.constraint is not None):
            self.thinking = ThinkingRow(thinking, tokenizer, params.thinking_tokens, params.constraint is not None)
        self.answer_tokens = [token for token in generated if self.append(token)]

    def end(self) -> None:
        """Gives back what the row has on the device."""
        self._biases.end(self.bias_row)
        self._seen.give_back(self.seen_row)

    @property
    def is_masked(self) -> bool:
        """Whether a constraint says which tokens may come next."""
        return self.params.constraint is not None and (self.thinking is None or self.thinking.is_answer)

    @property
    def is_edited(self) -> bool:
        """Whether its logits are changed or masked in the next step."""
        params = self.params
        has_row = bool(self.bias_row or self.seen_row)
        return has_row or self.generated < params.min_tokens or bool(self._bad_sequences) or self.is_masked

    @property
    def awaits_tokens(self) -> bool:
        """Whether its next token cannot be chosen before the last one was given to `append`."""
        is_thinking = self.thinking is not None and not self.thinking.state.is_over
        return is_thinking or bool(self._bad_sequences) or self.params.constraint is not None

    def append(self, token: int) -> bool:
        """Takes the token that was chosen last, where it is awaited.

        Returns:
            Whether it belongs to the answer, so that a constraint has to follow it.
        """
        self._tokens.append(token)
        return self.thinking is None or self.thinking.append(token)

    def find_forbidden(self) -> list[int]:
        """Returns the tokens that must not come next, besides those of its bias."""
        ends = self._end_ids if self.generated < self.params.min_tokens else []
        if not self._bad_sequences:
            return ends
        return [*ends, *find_forbidden(self._bad_sequences, self._tokens)]


def _to_signed(seed: int) -> int:
    """Returns the number that has the 64 bits of `seed` in a tensor of int64."""
    return seed - 2**64 if seed >= 2**63 else seed


def _bias_of(prompt: Prompt, forbidden: Sequence[int]) -> Bias:
    params = prompt.params
    allowed = tuple(sorted(set(params.allowed_token_ids)))
    return tuple(sorted(params.logit_bias)), allowed, tuple(sorted(set(forbidden)))
