"""One model over several ranks: the first one leads, and the others make the same steps as it tells them to.

The leader alone has prompts, plans steps, chooses tokens and reads them. Before each step it tells the others what to
compute, so that all ranks make the same forwards in the same order; where more than the best tokens is wanted, the
others wait for those that it chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from batchgen import device
from batchgen.engine import Peers, SignsOfLife
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.layout import round_as_cache, use_adapter
from batchgen.engines.paged.runner import Runner
from batchgen.engines.paged.sizing import CacheLesson
from batchgen.engines.paged.step import Step
from batchgen.generation import selftest
from batchgen.types import Tokens

_SILENT_SECONDS = 1.0  # at most, of a leader with nothing to do


class _Message(IntEnum):
    """What the leader tells the others begins with one of these numbers."""

    ASK_TO_STOP = 0  # whether one of them was asked to stop
    END = 1
    STEP = 2  # a packed `Step` follows
    SELF_TEST = 3  # of a row: its adapter, how many tokens its prompt has, these tokens, and those that were generated


class Leader:
    """Makes the other ranks make the steps of this one.

    Args:
        runner: of this rank.
        peers: the ranks that hold the model together with this one, which is their first.
        signs: count a step when the others are about to be told something, so that a leader which does not come to that
            has counted less than those that wait for it; and an idle report when they have answered.
    """

    def __init__(self, runner: Runner, peers: Peers, signs: SignsOfLife) -> None:
        self._runner, self._peers, self._signs = runner, peers, signs
        self._asked_at = time.monotonic()
        self.must_stop = False  # another rank was asked to stop

    def launch(self, step: Step) -> LaunchedStep:
        """Starts a step, on all ranks."""
        self._tell(_Message.STEP, step.pack())
        return self._runner.launch(step)

    def ask_to_stop(self) -> None:
        """About once a second, asks whether another rank was asked to stop; so they hear that this one is alive."""
        if time.monotonic() - self._asked_at > _SILENT_SECONDS:
            self._peers.tell(np.array([_Message.ASK_TO_STOP]))
            self.must_stop |= self._peers.any_rank(False)
            self._asked_at = time.monotonic()
            self._signs.idle_reports += 1

    def announce_self_test(self, prompt: Tokens, tokens: Tokens, adapter: int) -> None:
        """The others take part in the forward of a self-test, which this rank makes next.

        Args:
            adapter: its number; 0: none.
        """
        self._tell(_Message.SELF_TEST, np.array([adapter, len(prompt), *prompt, *tokens]))

    def end(self) -> None:
        """There are no more steps: the others leave `Follower.follow`."""
        self._tell(_Message.END)

    def _tell(self, message: _Message, numbers: NDArray[np.int64] | None = None) -> None:
        self._signs.steps += 1
        self._peers.tell(np.array([message]) if numbers is None else np.concatenate([[message], numbers]))


class Follower:
    """Makes the steps that the leader tells this rank to make.

    Args:
        runner: of this rank.
        peers: the ranks that hold the model together with this one, which is not their first.
        signs: count a step when this rank is ready to be told something, so that whoever does not come to that, the
            leader included, has counted less than the ranks that wait for it; and an idle report when the leader has
            said that there is nothing to do.
    """

    def __init__(self, runner: Runner, peers: Peers, signs: SignsOfLife) -> None:
        self._runner, self._peers, self._signs = runner, peers, signs
        self._in_flight: LaunchedStep | None = None

    def follow(self, stop: Callable[[], bool]) -> None:
        """Makes steps until the leader says that there are no more.

        Args:
            stop: whether this rank was asked to stop; the leader is told.

        Raises:
            OutOfStep: this rank has no memory for a step.
        """
        self._signs.steps += 1
        while (told := self._peers.told())[0] != _Message.END:
            if told[0] == _Message.ASK_TO_STOP:
                self._peers.any_rank(stop())
                self._signs.idle_reports += 1
                continue
            try:
                if told[0] == _Message.SELF_TEST:
                    self._take_part_in_self_test(told[1:])
                else:
                    self._launch(Step.unpack(told[1:]))
            except (RuntimeError, MemoryError) as error:
                if not device.is_out_of_memory(error):
                    raise
                raise CacheLesson(self._runner.pages).to_error() from error
            self._signs.steps += 1

    def _launch(self, step: Step) -> None:
        launched = self._runner.launch(step)
        if self._in_flight is not None:
            self._in_flight.wait()  # its buffers are filled again two steps later
        self._in_flight = launched

    def _take_part_in_self_test(self, numbers: NDArray[np.int64]) -> None:
        prompt, tokens = np.split(numbers[2:], [numbers[1]])
        with use_adapter(int(numbers[0])), round_as_cache(self._runner.limits.kv_dtype):
            selftest.logits_of(self._runner.compute_alone, prompt.tolist(), tokens.tolist(), self._runner.device)
