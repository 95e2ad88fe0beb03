"""The masks of rows with a constraint: which tokens may come next, made in a thread while the device computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future

import torch
from llguidance import LLMatcher

from batchgen.generation.matchers import Matchers, describe_error, matchers_of
from batchgen.generation.sampling import send
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Constraint


class Masks:
    """The matchers of the rows in some places, and the masks of their next tokens.

    What takes long is done in one thread, in the order in which it was asked for; `wait` waits for it.

    Args:
        places: how many there are.
        tokenizer: the model's.
        device: where masks are wanted.
    """

    def __init__(self, places: int, tokenizer: HfTokenizer, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._places, self._device = places, device
        self._matchers: Matchers | None = None  # with the first constraint
        self._masks = self._device_masks = torch.empty(0)  # [places, words]; a CPU has one tensor for both
        self._is_sent = True  # what is in `_masks` is in `_device_masks`
        self._rows: dict[int, LLMatcher] = {}  # by their places
        self._errors: dict[int, str] = {}
        self._complete: set[int] = set()
        self._jobs: list[Future[None]] = []

    def begin(self, place: int, constraint: Constraint, tokens: Sequence[int]) -> None:
        """Begins to follow a row whose answer consists of `tokens` so far."""
        if self._matchers is None:
            self._matchers = matchers_of(self._tokenizer)
            shape = (self._places, self._matchers.words)
            self._masks = torch.zeros(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._device_masks = self._masks.to(self._device)
        self._jobs.append(self._matchers.worker.submit(self._make, place, constraint, list(tokens)))

    def end(self, place: int) -> None:
        """Forgets the row in a place, after pending mask jobs."""
        if self._matchers is not None:
            self._jobs.append(self._matchers.worker.submit(self._forget, place))

    def advance(self, tokens: Mapping[int, int]) -> None:
        """Takes the next token of some places, and begins to make the masks for the token after each."""
        self.wait()
        rows = {place: self._rows[place] for place in tokens if place in self._rows}
        if not rows or self._matchers is None:
            return
        self._matchers.threads.consume_token_par([(row, tokens[place]) for place, row in rows.items()])
        self._note_errors(rows)
        self._complete |= {place for place, row in rows.items() if row.is_stopped()}
        open_places = [place for place in rows if place not in self._complete]  # a row with an error is stopped, too
        if open_places:
            self._jobs.append(self._matchers.worker.submit(self._fill, open_places))

    def is_complete(self, place: int) -> bool:
        """Returns whether nothing can follow what the row has: no token, or an end of sequence alone."""
        return place in self._complete and place not in self._errors

    def find_error(self, place: int) -> str | None:
        """Returns what has gone wrong with the row's constraint, in llguidance's words; None: nothing has so far.

        What is found while a mask is made is known after the next `wait`.
        """
        return self._errors.get(place)

    def find(self, places: Sequence[int], also: Mapping[int, int]) -> torch.Tensor:
        """Returns the masks of the rows in some places, int32 [rows, words], on the device.

        Args:
            also: a token that is allowed besides, by its place.
        """
        self.wait()
        if not self._is_sent:
            # All of them in one copy, without waiting: the masks of these rows are made anew only once the tokens that
            # are chosen by this copy have been read.
            end = max(self._rows, default=-1) + 1
            self._device_masks[:end].copy_(self._masks[:end], non_blocking=True)
            self._is_sent = True
        masks = self._device_masks[send(torch.tensor(places), self._device)]
        more = [(row, also[place] // 32, _bit(also[place])) for row, place in enumerate(places) if place in also]
        if more:
            rows, words, bits = send(torch.tensor(more).T.contiguous(), self._device)
            masks[rows, words] |= bits.int()
        return masks

    def wait(self) -> None:
        """Waits for the masks."""
        jobs, self._jobs = self._jobs, []
        self._is_sent &= not jobs
        for job in jobs:
            job.result()

    def _make(self, place: int, constraint: Constraint, tokens: Sequence[int]) -> None:
        assert self._matchers is not None
        self._forget(place)
        try:
            matcher = self._matchers.copy(constraint)
        except (ValueError, RecursionError) as error:  # no grammar, or one that is nested too deeply
            self._errors[place] = " ".join(str(error).split())[:300].rstrip(".")
            return
        self._rows[place] = matcher
        if tokens:
            matcher.consume_tokens(list(tokens))
        if matcher.is_stopped():
            self._note_errors([place])
            self._complete.add(place)
        else:
            self._fill([place])

    def _forget(self, place: int) -> None:
        self._rows.pop(place, None)
        self._errors.pop(place, None)
        self._complete.discard(place)

    def _fill(self, places: Sequence[int]) -> None:
        assert self._matchers is not None
        rows = [(self._rows[place], place) for place in places if place in self._rows]
        self._matchers.threads.unsafe_compute_mask_ptr(
            rows, self._masks.data_ptr(), self._matchers.words * self._masks.itemsize, len(self._masks)
        )
        self._note_errors(places)

    def _note_errors(self, places: Collection[int]) -> None:
        for place in places:
            if place in self._rows and self._rows[place].is_error():
                self._errors[place] = describe_error(self._rows[place])


def _bit(token: int) -> int:
    """The bit of a token in its word, as a number of int32."""
    bit = 1 << token % 32
    return bit if bit < 2**31 else bit - 2**32
