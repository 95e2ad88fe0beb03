"""`TokenChooser` inside one `model.generate(do_sample=False)` call.

`generate` has one set of sampling parameters and one random stream for the whole batch. A batch here mixes rows, so
that the tokens are chosen here, and `generate` is left nothing but the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import LogitsProcessor

from batchgen.generation.choice import NOTHING_LEFT, ChosenLogprob, TokenLogprobs
from batchgen.generation.choosing import TokenChooser, needs_chooser
from batchgen.generation.finite import NotFinite
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt


class ChosenToken(LogitsProcessor):
    """Makes the token that was chosen for each row the only possible one.

    Args:
        prompts: the rows of the batch.
        tokenizer: the model's.
        device: where token ids are, and the logits.
        not_finite: has marked the rows of the current step whose logits are not finite; they get any token.
        agree: overwrites token ids, [rows], with those of the first of several ranks, and returns them
            (`Peers.tokens`); None: there is one rank.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: HfTokenizer,
        device: torch.device,
        not_finite: NotFinite,
        agree: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._prompts, self._tokenizer, self.device = prompts, tokenizer, device
        self._not_finite, self._agree = not_finite, agree
        self._places = range(len(prompts))
        self._needs_best = any(prompt.params.temperature == 0 for prompt in prompts)
        self.is_needed = agree is not None or any(map(needs_chooser, prompts))
        """Whether the best tokens are not all that there is to it."""
        self.chooser: TokenChooser | None = None
        """It is made with the first logits, which say how many tokens the model knows."""
        self.impossible: torch.Tensor | None = None
        """Which rows have no token left in the current step, bool [rows]; None: the processor is not needed."""
        self._steps: list[TokenLogprobs] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.chooser is None:
            self.chooser = self._begin(scores.shape[-1])
        best = scores.argmax(-1) if self._needs_best else input_ids.new_zeros(len(scores))
        chosen = self.chooser.choose(scores, self._places, best.masked_fill(self._not_finite.rows, -1))
        if chosen.logprobs is not None:
            self._steps.append(chosen.logprobs)
        self.impossible = chosen.tokens == NOTHING_LEFT
        return scores.scatter_(1, chosen.tokens.clamp(min=0)[:, None], torch.inf)

    def _begin(self, vocabulary: int) -> TokenChooser:
        chooser = TokenChooser(len(self._prompts), vocabulary, self._tokenizer, self.device, agree=self._agree)
        for place, prompt in enumerate(self._prompts):
            chooser.begin(place, prompt)
        return chooser

    def may_await(self, row: int) -> bool:
        """Returns whether the row's next token may depend on its last one."""
        params = self._prompts[row].params
        return params.constraint is not None or params.thinking_tokens is not None or bool(params.bad_words)

    def advance(self, tokens: Mapping[int, int]) -> None:
        """Takes the last tokens of rows, of which the chooser gets those that it awaits."""
        if self.chooser is not None:
            self.chooser.advance({row: token for row, token in tokens.items() if self.chooser.awaits_tokens(row)})

    def is_complete(self, row: int) -> bool:
        """Returns whether nothing can follow what the row has, by its constraint."""
        return self.chooser is not None and self.chooser.is_complete(row)

    def find_error(self, row: int) -> str | None:
        """Returns what has gone wrong with the row's constraint; None: nothing has."""
        return None if self.chooser is None else self.chooser.find_error(row)

    def read_logprobs(self) -> dict[int, list[ChosenLogprob]]:
        """Returns, for each row that asks, one value for each step, also for the steps after its end."""
        if not self._steps:
            return {}
        found: dict[int, list[ChosenLogprob]] = {row: [] for row in self._steps[0].rows}
        logprobs, top_ids, top = (
            torch.cat([getattr(step, name) for step in self._steps]).tolist()
            for name in ("logprobs", "top_ids", "top_logprobs")
        )
        rows = [row for step in self._steps for row in step.rows]  # in another order where constraints begin or end
        for row, *numbers in zip(rows, logprobs, top_ids, top, strict=True):
            found[row].append(ChosenLogprob(*numbers))
        return found
