"""When a row ends, inside one `model.generate` call or row by row: its length, an end of sequence, a stop text.

`generate` has one length for the whole batch. `Stopper` ends each row on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from batchgen.generation.finite import NotFinite
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Details, FinishReason, Generation, Prompt

# A tail of tokens can begin in the middle of a character and may hold tokens without text (special ones).
_TAIL_MARGIN = 8


class StopTexts:
    """Finds stop texts in the rows that have some, token by token, by decoding the end of the row."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        special_tokens: Mapping[str, int],
    ) -> None:
        self._prompts = prompts
        self._decode = decode
        self.end_tokens = frozenset(end_tokens)
        """Ids that end a row."""
        self._special = special_tokens
        self.rows = [row for row, prompt in enumerate(prompts) if prompt.params.stop]
        """Rows that still have to be watched."""
        self._tokens: dict[int, list[int]] = {row: [] for row in self.rows}

    @classmethod
    def of(cls, prompts: Sequence[Prompt], tokenizer: HfTokenizer) -> StopTexts:
        """Makes it with the end tokens, the decoding and the special tokens of the model's tokenizer."""
        return cls(prompts, tokenizer.end_tokens, tokenizer.decode, tokenizer.special_tokens)

    def append(self, tokens: Sequence[int]) -> list[int]:
        """Takes the next token of each of `rows`; returns the rows whose text now holds a stop text.

        Those, and the rows that ended by themselves, leave `rows`.
        """
        stopped: list[int] = []
        watched: list[int] = []
        for row, token in zip(self.rows, tokens, strict=True):
            generated = self._tokens[row]
            generated.append(token)
            if self._stops(row, generated):
                stopped.append(row)
            elif token not in self.end_tokens and len(generated) < self._prompts[row].params.max_new_tokens:
                watched.append(row)
        self.rows = watched
        return stopped

    def _stops(self, row: int, generated: list[int]) -> bool:
        stops = self._prompts[row].params.stop
        # Special tokens have no text in the output, yet people name them: stop=["<|im_end|>"].
        if any(self._special.get(stop) == generated[-1] for stop in stops):
            return True
        # A token with text has at least one byte, so a stop text of n bytes lies within n tokens.
        longest = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops)
        tail = self._decode(generated[-(longest + _TAIL_MARGIN) :])
        return any(stop in tail for stop in stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns `text` up to the first of `stops`."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def generation(
    prompt: Prompt, tokens: Sequence[int], stopped: bool, tokenizer: HfTokenizer, logprobs: Sequence[float] | None
) -> Generation:
    """Returns the generation of `prompt`: the text of its `tokens` before the first of its stop texts.

    Args:
        stopped: an end of sequence or a stop text has ended it, not its length.
        logprobs: of each of `tokens`, if the prompt asks for them.
    """
    text = tokenizer.decode(tokens)
    kept = cut(text, prompt.params.stop)
    reason: FinishReason = "stop" if stopped or kept != text else "length"
    texts = None if logprobs is None or prompt.request is None else [tokenizer.token_text(token) for token in tokens]
    details = None if texts is None else Details(token_texts=texts)
    return Generation.of(prompt, kept, reason, len(tokens), logprobs, details)


class Stopper(StoppingCriteria):
    """Ends each row at its own length, at an end-of-sequence token or at a stop text; the batch when `stop()` is true.

    What a row is worth is read off here after `generate`, never off the padded output: `lengths` counts tokens up to
    and including the last one, `stopped` says which rows ended before their length, `failed` which ones have ended
    because their logits were not finite.

    The device is not waited for, except by rows with stop texts: `generate` itself waits once a step, and the number
    of live rows is copied before that and read after it.

    Args:
        prompts: the rows of the batch, in order.
        texts: finds the stop texts of these rows, and knows the tokens that end one.
        not_finite: has marked the rows of the current step whose logits are not finite.
        device: where token ids are.
        stop: whether to end the whole batch now; asked at each step.
        count: is called at each step with the number of tokens that the batch has generated in it.

    Attributes:
        lengths: generated tokens of each row, int64 [rows].
        stopped, failed: as above, bool [rows].
        steps: made so far.
        abandoned: `stop()` has ended the batch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        texts: StopTexts,
        not_finite: NotFinite,
        *,
        device: torch.device,
        stop: Callable[[], bool],
        count: Callable[[int], None],
    ) -> None:
        rows = len(prompts)
        limits = [prompt.params.max_new_tokens for prompt in prompts]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.failed = torch.zeros(rows, dtype=torch.bool, device=device)
        self.steps = 0
        self.abandoned = False
        self._alive = torch.ones(rows, dtype=torch.bool, device=device)
        self._limits = torch.tensor(limits, dtype=torch.long, device=device)
        self._longest = max(limits)
        self._end = torch.tensor(sorted(texts.end_tokens), dtype=torch.long, device=device)
        self._texts = texts
        self._not_finite = not_finite
        self._stop = stop
        self._count = count
        self._live = torch.tensor(rows, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self._copied is not None:
            self._copied.synchronize()
        self._count(int(self._live))
        failed = self._alive & self._not_finite.rows
        self.failed |= failed
        self._alive &= ~failed
        self.lengths += self._alive
        ended = torch.isin(input_ids[:, -1], self._end)
        if self._texts.rows:
            stopped = self._texts.append(input_ids[self._texts.rows, -1].tolist())
            if stopped:
                ended[stopped] = True
        self.stopped |= self._alive & ended
        self._alive &= ~ended & (self._limits > self.steps)
        self._live.copy_(self._alive.sum(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self.steps < self._longest and self._stop():
            self.abandoned = True
            return torch.ones_like(self._alive)
        return ~self._alive
