"""What fits, how large a batch, how long: from a model's config and the lengths of an input. No weights, no GPU.

Memory is counted as the engines count it (`models.footprint`, `Engine.placements`), and time as `speed` has it. Where
a bench of the same model has measured a step, that is taken instead of the formulas.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from batchgen.engine import Engine, Pace, Placement
from batchgen.engines import find as find_engine
from batchgen.engines import names as engine_names
from batchgen.generation import limits
from batchgen.planning.hardware import Card
from batchgen.planning.speed import Model, Node, Speed
from batchgen.planning.work import Work
from batchgen.types import UserError
from batchgen.world import World

__all__ = ["Expected", "Forecast", "Model", "Node", "PlanError", "Work", "forecasts"]

_STAGES = 16  # in which rows that come and go become fewer


class PlanError(UserError):
    """There is nothing to plan with: a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of an engine."""

    engine: str
    placement: Placement
    why_not: str  # it does not fit; "" if it does
    batch: int = 0  # rows of a stream at once, most, of the longest rows
    device_bytes: int = 0  # at that batch
    tokens_per_second: float = 0.0
    seconds: float = 0.0  # of the whole work, without loading
    bound: str = ""  # what most of a step's time goes to
    measured: bool = False  # from a bench of this model, instead of the formulas


class _Part(NamedTuple):
    """A part of a stream's work: a kind of batch, or a stretch of steps."""

    times: float  # that it is there
    rows: int
    context: float  # tokens of a row, on the average
    steps: float
    prompts: float  # tokens of prefill


def forecasts(
    model: Model,
    work: Work,
    node: Node,
    measured: Mapping[str, Mapping[int, float]],
    engines: Collection[str] | None = None,
) -> list[Forecast]:
    """Every engine's placements, the fastest that fits first.

    Args:
        measured: by system as `bench` names it, seconds of a decode step by batch, of this model on this kind of card,
            with a rank on each GPU.
        engines: those that matter; None: all.
    """
    results = []
    for name in engine_names() if engines is None else engines:
        kind = find_engine(name)
        # Of a bench that says nothing of groups.
        usual = kind.stream(World(size=node.gpus, local_size=node.gpus), kind.Options()).count
        held = model if _keeps(kind, model, node.card) else model.widened
        for placement in kind.placements(model.config, held.weights, node.gpus):
            system = ":".join([name, *placement.settings])
            short = name if placement.sharing > 1 and placement.streams == usual else system
            # What one rank does over all GPUs is not what a rank on each does.
            step_seconds = (measured.get(system) or measured.get(short) or {}) if placement.ranks == node.gpus else {}
            results.append(Expected(kind.pace, placement, held, node, step_seconds).forecast(name, work))
    return sorted(results, key=lambda forecast: (bool(forecast.why_not), forecast.seconds, -forecast.batch))


def _keeps(kind: type[Engine], model: Model, card: Card) -> bool:
    """Whether an engine holds the weights as they are stored on this card."""
    return not model.is_quantised or (kind.keeps_quantised and (card.fp8 or model.stored != "fp8"))


@dataclass(frozen=True)
class Expected:
    """A placement of an engine on a node."""

    pace: Pace
    placement: Placement
    model: Model
    node: Node
    step_seconds: Mapping[int, float]  # measured seconds of a step by rows

    def forecast(self, name: str, work: Work) -> Forecast:
        """What is expected for this work."""
        placement = self.placement
        longest = max(prompt for prompt, _ in work.lengths), max(new for _, new in work.lengths)
        why_not = self._why_not(longest)
        if why_not:
            return Forecast(name, placement, why_not)
        seconds, bounds = 0.0, dict[str, float]()
        for part in self._in_flight(work) if self.pace.continuous else self._batches(work):
            step, bound = self.step(part.rows, part.context)
            spent = part.times * (part.steps * step + self._speed.prefill(part.prompts))
            seconds += spent
            bounds[bound] = bounds.get(bound, 0.0) + spent
        batch = self.find_largest_batch(longest)
        size = self._fixed + batch * self._row_bytes(longest)
        speed = sum(new for _, new in work.lengths) * work.rows / len(work.lengths) / seconds
        bound = max(bounds, key=lambda bound: bounds[bound])
        return Forecast(name, placement, "", batch, size, speed, seconds, bound, bool(self.step_seconds))

    def _why_not(self, longest: tuple[int, int]) -> str:
        placement, node = self.placement, self.node
        if node.gpus // node.hosts % placement.sharing:
            return f"{placement.sharing} ranks would share each step over the network between hosts"
        if self._fixed > node.room:
            return f"{_gb(self._fixed)} of weights are more than the {_gb(node.room)} of a {node.device}"
        if self.find_largest_batch(longest) == 0:
            free, row = _gb(node.room - self._fixed), _gb(self._row_bytes(longest))
            return f"beside {_gb(self._fixed)} of weights, {free} are left, and a row takes {row}"
        if node.host_memory is not None and placement.host > node.host_memory:
            return f"{_gb(placement.host)} of weights are more than the host's memory"
        return ""

    @property
    def _fixed(self) -> int:
        """Bytes of weights on a device."""
        return self.placement.device + self.placement.gathered

    def _row_bytes(self, length: tuple[int, int]) -> int:
        return self.model.row_bytes(*length, self._speed.execution)

    def find_largest_batch(self, length: tuple[int, int]) -> int:
        """Rows of that length, in prompt and new tokens, that fit."""
        return max(0, self.node.room - self._fixed) // self._row_bytes(length)

    def _rows_of_batch(self, length: tuple[int, int]) -> int:
        """Rows of that length that a run takes where no batch size is given."""
        device = torch.device("cuda" if self.node.card.gpu else "cpu")
        free = self.node.room - self._fixed
        return limits.count_rows_that_fit(free, self._row_bytes(length), device, self.placement.most_rows)

    def _batches(self, work: Work) -> Iterator[_Part]:
        """A stream's batches as `StaticBatches.pull` makes them, like lengths together."""
        ordered = sorted(work.lengths, key=lambda length: (length[1], length[0]), reverse=True)
        each = work.rows / len(ordered) / self.placement.streams  # rows of a stream that one of these stands for
        place = 0
        while place < len(ordered):
            prompt, new = ordered[place]
            taken = 1
            rows = self._rows_of_batch((prompt, new))
            while place + taken < len(ordered) and (taken + 1) * each <= rows:
                longer = max(prompt, ordered[place + taken][0])
                if longer > prompt and (taken + 1) * each > (rows := self._rows_of_batch((longer, new))):
                    break
                prompt, taken = longer, taken + 1
            inside = taken * each
            size = max(1, round(min(inside, rows)))
            yield _Part(max(1.0, inside / rows), size, prompt + new / 2, new, size * prompt)
            place += taken

    def _in_flight(self, work: Work) -> Iterator[_Part]:
        """A stream's work where rows come and go: as many as fit, of the average length; or all of them, ever fewer."""
        ends = sorted(new for _, new in work.lengths)
        prompt, new = sum(prompt for prompt, _ in work.lengths) / len(ends), sum(ends) / len(ends)
        stream = work.rows / self.placement.streams
        own = prompt * work.prompt_share  # tokens of a row's prompt that it does not share, computed and held for it
        fit = self.find_largest_batch(
            (round(own), max(1, round(new / 2)))
        )  # a row in flight has half of its new tokens
        if 0 < fit < stream:
            yield _Part(1.0, fit, prompt + new / 2, stream * new / fit, stream * own)
            return
        yield _Part(1.0, 1, 0.0, 0.0, stream * own)
        before, each = 0, max(1, len(ends) // _STAGES)
        for place in range(0, len(ends), each):
            end = ends[min(place + each, len(ends)) - 1]
            rows = max(1, round(stream * (len(ends) - place) / len(ends)))
            yield _Part(1.0, rows, prompt + (before + end) / 2, end - before, 0.0)
            before = end

    def step(self, rows: int, context: float) -> tuple[float, str]:
        """Seconds of a decode step of `rows` rows of `context` tokens, and what most of it goes to."""
        if self.step_seconds:
            return _between(self.step_seconds, rows), "what was measured"
        return self._speed.step(rows, context)

    @property
    def _speed(self) -> Speed:
        return Speed(self.pace, self.placement, self.model, self.node)


def _between(step_seconds: Mapping[int, float], rows: int) -> float:
    """Seconds of a step of `rows` rows, between the nearest that were measured; beyond the last in proportion."""
    batches = sorted(step_seconds)
    place = bisect_left(batches, rows)
    if place == len(batches):
        return step_seconds[batches[-1]] * rows / batches[-1]
    if place == 0:
        return step_seconds[batches[0]]
    (low, high), *_ = [pair for pair in pairwise(batches) if pair[1] == batches[place]]
    share = (rows - low) / (high - low)
    return step_seconds[low] + share * (step_seconds[high] - step_seconds[low])


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
