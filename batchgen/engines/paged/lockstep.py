"""One model over several ranks: the first plans and reads; the others make the same steps as it tells them to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchgen import device
from batchgen.engine import OutOfStep
from batchgen.engines.paged.launched_step import Flight
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.step import Step
from batchgen.types import Tokens

_WORD_SECONDS = 1.0


@dataclass(frozen=True)
class Peers:
    """Ranks with a share of each layer. All of them make each of the calls of both kinds, in the same order."""

    place: int  # of this rank among them; 0: it plans
    count: int
    tell: Callable[[NDArray[np.int64]], None]  # the others; of the first rank
    told: Callable[[], NDArray[np.int64]]  # what it tells; of the others
    any_rank: Callable[[bool], bool]  # whether it is true on one of them
    least: Callable[[int], int]  # the smallest of their numbers
    tokens: Callable[[torch.Tensor], torch.Tensor]  # puts the first rank's in their place

    @classmethod
    def alone(cls) -> Peers:
        """A rank that has nobody to tell anything."""

        def same(what: Any) -> Any:
            return what

        return cls(0, 1, tell=same, told=lambda: np.array([_Word.END]), any_rank=same, least=same, tokens=same)


class _Word(IntEnum):
    """What the first rank tells begins with one of these."""

    ASK = 0  # whether one of them wants to stop
    END = 1
    STEP = 2  # a packed `Step` follows
    LOOK = 3  # at the first tokens of a row, which takes a forward: those of its prompt, counted, and generated ones


def no_memory(pages: int) -> OutOfStep:
    """What ends the attempt when one of the ranks had no memory beside a cache of so many pages.

    The limit that is recorded of it has the size of that cache as its length, below which the next attempt begins.
    """
    error = OutOfStep("out of memory in a step that several ranks take together")
    error.length, error.rows = pages * PAGE_SIZE, 2
    return error


class Leader:
    """A runner whose steps the other ranks make, too.

    Args:
        count: is called when the others are about to be told to do something.
        hear: is called when they have answered, and there is nothing to do.
    """

    def __init__(self, runner: Runner, peers: Peers, count: Callable[[], None], hear: Callable[[], None]) -> None:
        self._runner, self._peers, self._count, self._hear = runner, peers, count, hear
        self._spoke = time.monotonic()
        self.asked_to_stop = False  # one of the others was

    def launch(self, step: Step) -> Flight:
        """Starts a step, on all ranks."""
        self._tell(_Word.STEP, step.pack())
        return self._runner.launch(step)

    def breathe(self) -> None:
        """About once a second asks whether another rank was asked to stop, so that those hear from this one."""
        if time.monotonic() - self._spoke > _WORD_SECONDS:
            self._peers.tell(np.array([_Word.ASK]))
            self.asked_to_stop |= self._peers.any_rank(False)
            self._spoke = time.monotonic()
            self._hear()

    def look(self, prompt: Tokens, tokens: Tokens) -> None:
        """The others are about to look at those tokens, and so should this one."""
        self._tell(_Word.LOOK, np.array([len(prompt), *prompt, *tokens]))

    def end(self) -> None:
        """The others leave `follow`."""
        self._tell(_Word.END)

    def _tell(self, word: _Word, numbers: NDArray[np.int64] | None = None) -> None:
        self._count()
        self._peers.tell(np.array([word]) if numbers is None else np.concatenate([[word], numbers]))


def follow(
    runner: Runner,
    peers: Peers,
    look: Callable[[Tokens, Tokens], object],
    stop: Callable[[], bool],
    count: Callable[[], None],
    hear: Callable[[], None],
) -> None:
    """Makes the steps that the first rank tells, until it says that there are no more.

    Args:
        look: makes the forward of the first rank's look at a row, given the tokens of its prompt and generated ones.
        stop: whether this rank was asked to stop; the first one is told.
        count: is called when this rank is ready to be told what to do. So whoever does not come to that, the first rank
            included, has counted less than the others that wait for it.
        hear: is called when the first rank has said that there is nothing to do.

    Raises:
        OutOfStep: this rank has no memory for a step.
    """
    before: Flight | None = None
    count()
    while (told := peers.told())[0] != _Word.END:
        if told[0] == _Word.ASK:
            peers.any_rank(stop())
            hear()
            continue
        try:
            if told[0] == _Word.LOOK:
                prompt, tokens = np.split(told[2:], [told[1]])
                look(prompt.tolist(), tokens.tolist())
            else:
                flight = runner.launch(Step.unpack(told[1:]))
                if before is not None:
                    before.wait()  # its arrays are filled again two steps later
                before = flight
        except (RuntimeError, MemoryError) as error:
            if not device.is_out_of_memory(error):
                raise
            raise no_memory(runner.pages) from error
        count()
