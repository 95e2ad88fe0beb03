"""A row in its place: its random numbers, how much it has generated, and what that means for its next token."""

from __future__ import annotations

import random
from collections.abc import Sequence

from batchgen.generation.bad_words import find_forbidden, find_sequences
from batchgen.generation.pools import Bias, BiasPool, SeenPool
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt


class RowState:
    """A row that has generated some tokens.

    Args:
        prompt: the row.
        generated: its tokens so far.
        tokenizer: of the model.
        seen, biases: where the row takes what it needs on the device, until `end`.
    """

    def __init__(
        self, prompt: Prompt, generated: Sequence[int], tokenizer: HfTokenizer, seen: SeenPool, biases: BiasPool
    ) -> None:
        params = prompt.params
        self.prompt, self.params = prompt, params
        self.generated = len(generated)
        """How many tokens have been chosen for it."""
        self._random: random.Random | None = None
        if params.temperature > 0:
            self._random = random.Random(prompt.row_seed)
            for _ in generated:  # a number each
                self._random.random()
        self._seen, self._biases = seen, biases
        self._end_ids = [*tokenizer.end_tokens, *params.stop_token_ids] if params.min_tokens else []
        sequences = find_sequences(params.bad_words, tokenizer) if params.bad_words else []
        self._bad_sequences = [sequence for sequence in sequences if len(sequence) > 1]
        self._tokens = list(generated)  # kept up to date only where they are read
        self.bias_row = biases.begin(_bias_of(prompt, [sequence[0] for sequence in sequences if len(sequence) == 1]))
        self.has_penalty = params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)
        self.seen_row = seen.begin(prompt.tokens, generated) if self.has_penalty else 0

    def end(self) -> None:
        """Gives back what the row has on the device."""
        self._biases.end(self.bias_row)
        self._seen.give_back(self.seen_row)

    @property
    def is_edited(self) -> bool:
        """Whether its logits are changed, masked or forced in the next step."""
        return bool(self.bias_row or self.seen_row or self.generated < self.params.min_tokens or self._bad_sequences)

    @property
    def awaits_tokens(self) -> bool:
        """Whether its next token cannot be chosen before the last one was given to `append`."""
        return bool(self._bad_sequences)

    def append(self, token: int) -> None:
        """Takes the token that was chosen last, where it is awaited."""
        self._tokens.append(token)

    def draw(self) -> float:
        """Returns the row's next random number, from 0 to 1; 0 for a greedy row, which has none."""
        return 0.0 if self._random is None else self._random.random()

    def find_forbidden(self) -> list[int]:
        """Returns the tokens that are impossible in the next step, besides those of its bias."""
        ends = self._end_ids if self.generated < self.params.min_tokens else []
        if not self._bad_sequences:
            return ends
        return [*ends, *find_forbidden(self._bad_sequences, self._tokens)]


def _bias_of(prompt: Prompt, forbidden: Sequence[int]) -> Bias:
    params = prompt.params
    allowed = tuple(sorted(set(params.allowed_token_ids)))
    return tuple(sorted(params.logit_bias)), allowed, tuple(sorted(set(forbidden)))
