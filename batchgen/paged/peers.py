"""One model over several ranks: the first plans and reads; the others make the same steps as it tells them to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from batchgen import memory
from batchgen.engine import OutOfStep
from batchgen.paged.flight import Flight
from batchgen.paged.pages import SIZE
from batchgen.paged.runner import Runner
from batchgen.paged.step import Step
from batchgen.types import Prompt

_WORD_SECONDS = 1.0


@dataclass(frozen=True)
class Peers:
    """Ranks with a share of each layer. All of them make each of the calls of both kinds, in the same order."""

    place: int  # of this rank among them; 0: it plans
    count: int
    tell: Callable[[object], None]  # the others; of the first rank
    told: Callable[[], Any]  # what it tells; of the others
    any_rank: Callable[[bool], bool]  # whether it is true on one of them
    least: Callable[[int], int]  # the smallest of their numbers
    tokens: Callable[[torch.Tensor], torch.Tensor]  # puts the first rank's in their place

    @classmethod
    def alone(cls) -> Peers:
        """A rank that has nobody to tell anything."""

        def same(what: Any) -> Any:
            return what

        return cls(0, 1, tell=same, told=lambda: None, any_rank=same, least=same, tokens=same)


class _Word(Enum):
    ASK = "does one of us want to stop?"
    END = "that was all"


@dataclass(frozen=True)
class _Check:
    """The first tokens of a row, to be looked at by all ranks: it takes a forward."""

    prompt: Prompt
    tokens: list[int]


def no_memory(pages: int) -> OutOfStep:
    """What ends the attempt when one of the ranks had no memory beside a cache of so many pages.

    The limit that is recorded of it has the size of that cache as its length: each attempt that ends so adds one, and
    by their number the next one's cache is smaller.
    """
    error = OutOfStep("out of memory in a step that several ranks take together")
    error.length, error.rows = pages * SIZE, 2
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
        self._tell(dataclasses.replace(step, sequences=[]))
        return self._runner.launch(step)

    def breathe(self) -> None:
        """About once a second asks whether another rank was asked to stop, so that those hear from this one."""
        if time.monotonic() - self._spoke > _WORD_SECONDS:
            self._peers.tell(_Word.ASK)
            self.asked_to_stop |= self._peers.any_rank(False)
            self._spoke = time.monotonic()
            self._hear()

    def check(self, prompt: Prompt, tokens: list[int]) -> None:
        """The others are about to look at that row, and so should this one."""
        self._tell(_Check(prompt, tokens))

    def end(self) -> None:
        """The others leave `follow`."""
        self._tell(_Word.END)

    def _tell(self, what: object) -> None:
        self._count()
        self._peers.tell(what)


def follow(
    runner: Runner,
    peers: Peers,
    check: Callable[[Prompt, list[int]], None],
    stop: Callable[[], bool],
    count: Callable[[], None],
    hear: Callable[[], None],
) -> None:
    """Makes the steps that the first rank tells, until it says that there are no more.

    Args:
        check: looks at the tokens of a row, as the first rank does.
        stop: whether this rank was asked to stop; the first one is told.
        count: is called when this rank is ready to be told what to do. So whoever does not come to that, the first rank
            included, has counted less than the others that wait for it.
        hear: is called when the first rank has said that there is nothing to do.

    Raises:
        OutOfStep: this rank has no memory for a step.
    """
    before: Flight | None = None
    count()
    while (told := peers.told()) is not _Word.END:
        if told is _Word.ASK:
            peers.any_rank(stop())
            hear()
            continue
        try:
            if isinstance(told, _Check):
                check(told.prompt, told.tokens)
            else:
                flight = runner.launch(told)
                if before is not None:
                    before.wait()  # its arrays are filled again two steps later
                before = flight
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise no_memory(runner.pages) from error
        count()
