"""One rank of a bench: loads an engine once, and times it over batch sizes or over a workload."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from batchgen import device, engines
from batchgen.bench import workloads
from batchgen.bench.machine import Floor, measure, synchronize
from batchgen.bench.progress import logging_tokens
from batchgen.bench.results import ARTICLE_JOB, BenchError
from batchgen.engine import Engine, OutOfStep, Setup
from batchgen.models import footprint, loading
from batchgen.types import Batch, Prompt, SamplingParams
from batchgen.world import World

logger = logging.getLogger(__name__)

_BARRIER_SECONDS = 3600.0  # ranks may load for minutes
_JOB_SECONDS = 60.0  # after this many a job is not repeated
_LONG_SECONDS = 300.0  # in which what an engine does once, however much, is too little to repeat a job for


@dataclass(frozen=True)
class Task:
    """What the ranks of one process group measure; passed on as JSON."""

    engine: str
    settings: list[str]
    model: str
    dtype: str
    batches: list[int]  # the batch sizes of the article's table
    tokens: int  # new tokens of each row of that table
    cycles: int
    jobs: dict[str, list[tuple[list[int], int]]]  # token ids and new tokens of each row, by name
    folder: str  # of this task alone: what each rank has found, and their barriers
    cache: str
    machine: str | None  # that these measurements belong to; None: any

    @classmethod
    def read(cls, path: Path) -> Task:
        """The task in the file `path`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Worker:
    """Carries a task out on one rank."""

    def __init__(self, task: Task, world: World) -> None:
        self._task, self._world = task, world
        self._kind = engines.find(task.engine)
        self._options = engines.parse_options(self._kind, task.settings)
        self._stream = self._kind.stream(world, self._options)
        self._tokenizer = self._kind.tokenizer(task.model)
        gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", loading.gpu_of(world)) if gpu else torch.device("cpu")
        self._barriers = 0

    def work(self) -> None:
        """Loads the engine, then measures cell after cell; what is found is written at once."""
        floor = self._find_floor()
        task = self._task
        start = time.perf_counter()
        max_batch = max(task.batches) if task.batches else None
        setup = Setup(
            task.model, task.dtype, max_batch, self._world, selftest=False, run=task.folder, cache=task.cache, limits={}
        )
        with self._kind(setup, self._options) as made:
            self._time(made, list)  # ranks that share a model make what is left when all of them are there
            self._write_line({"load_seconds": time.perf_counter() - start, "streams": self._stream.count})
            for rows in task.batches:
                with self._reporting_oom(ARTICLE_JOB, rows):
                    if not self._measure_batch(made, rows, floor):
                        return
            for name, job in task.jobs.items():
                with self._reporting_oom(name, None):
                    self._measure_job(made, name, job)

    @contextmanager
    def _reporting_oom(self, job: str, batch: int | None) -> Iterator[None]:
        """Says at once if this rank has no memory: those that wait for it may die of that before it has ended."""
        try:
            yield
        except OutOfStep:
            self._write_line({"job": job, "batch": batch, "outcome": "oom", "fits": self._fits([])})
            raise

    def _find_floor(self) -> Floor | None:
        config = getattr(self._tokenizer, "config", None)
        if config is None:  # echo
            return None
        name = self._task.dtype
        floating = name in ("auto", *loading.FLOATING)
        dtype = loading.floating_dtype(name, config) if floating else loading.own_dtype(config)
        machine = measure(self._device, dtype)
        if self._task.machine not in (None, machine.name):
            raise BenchError(
                f"what {Path(self._task.folder).parent} holds was measured on {self._task.machine}, and this is "
                f"{machine.name}: they do not belong into one table. Choose another folder with -o"
            )
        device.release()
        self._write_line({"machine": [machine.name, machine.bandwidth, machine.arithmetic]})
        kv_dtype = getattr(self._options, "kv_dtype", footprint.AUTO)
        cache = footprint.find_cache_format(kv_dtype)
        floor = Floor.of(config, dtype, machine, "" if floating else name, cache)
        self._write_line({"size": floor.size})
        return floor

    def _measure_batch(self, made: Engine, rows: int, floor: Floor | None) -> bool:
        """Measures a batch size; False if it does not fit."""
        tokens = self._task.tokens
        _, batches = self._time(made, self._batch(rows, tokens))  # the warm-up
        fits = self._fits(batches)
        refused = any(g.error is not None for batch in batches for g in batch.generations)
        # Where rows leave one by one, others take their place before all have come: `fits` says what was in work.
        enough = fits is None or fits >= rows or self._kind.pace.continuous
        if not self._is_true_on_all(enough and not refused):
            self._write_line(
                {"job": ARTICLE_JOB, "batch": rows, "outcome": "oom", "fits": self._fits([] if refused else batches)}
            )
            return False
        prefill = min(self._time(made, self._batch(rows, 1))[0] for _ in range(2))
        seconds = []
        for _ in range(self._task.cycles):
            spent, batches = self._time(made, self._batch(rows, tokens))
            seconds.append(spent)
        values = self._summarise(batches) | {
            "job": ARTICLE_JOB,
            "batch": rows,
            "fits": fits,
            "prefill_seconds": prefill,
        }
        if floor is not None:
            prompts = self._batch(rows, tokens)()
            longest = max(len(prompt.tokens) for prompt in prompts)
            least = floor.prefill(rows, longest) + floor.decode(rows, longest, tokens - 1)
            values["floor_seconds"] = least * (self._stream.count / self._world.size)
        self._write_line(values | {"seconds": seconds})
        return True

    def _batch(self, rows: int, tokens: int) -> Callable[[], list[Prompt]]:
        def tokenize(texts: Sequence[str]) -> Any:
            return self._tokenizer.tokenize(texts, special=True)

        return lambda: workloads.batch(tokenize, rows, tokens)

    def _measure_job(self, made: Engine, name: str, rows: list[tuple[list[int], int]]) -> None:
        rows = rows[self._stream.index :: self._stream.count]
        rows.sort(key=lambda row: (row[1], len(row[0])), reverse=True)  # as a run has them
        prompts = [workloads.prompt(n, ids, SamplingParams(max_new_tokens=new)) for n, (ids, new) in enumerate(rows)]
        seconds: list[float] = []
        warm = False
        while not seconds or (len(seconds) < self._task.cycles and self._is_true_on_all(sum(seconds) < _JOB_SECONDS)):
            with self._showing_progress(made, name, prompts):
                spent, batches = self._time(made, lambda: prompts)
            # The first time, an engine may still compile or record what it needs for the sizes that come up.
            warm, counts = True, warm or not self._is_true_on_all(spent < _LONG_SECONDS)
            if counts:
                seconds.append(spent)
                values = self._summarise(batches) | {"fits": self._fits(batches)}
                self._write_line(values | {"job": name, "batch": None, "seconds": seconds})
            if self._world.rank == 0:
                cycle = (
                    f"cycle {len(seconds)} of at most {self._task.cycles}" if counts else "a cycle that is not counted"
                )
                logger.info("%s: %s took %.1f s", name, cycle, spent)

    def _showing_progress(self, made: Engine, name: str, prompts: Sequence[Prompt]) -> AbstractContextManager[None]:
        """One rank speaks for all, of its own rows."""
        if self._world.rank > 0:
            return nullcontext()
        return logging_tokens(made.signs, name, sum(prompt.params.max_new_tokens for prompt in prompts))

    def _time(self, made: Engine, prompts: Callable[[], list[Prompt]]) -> tuple[float, list[Batch]]:
        """Seconds from the texts to the texts, all ranks having begun at once."""
        self._is_true_on_all(True)
        synchronize(self._device)
        start = time.perf_counter()
        batches = list(made.generate(iter(prompts()), lambda: False))
        synchronize(self._device)
        return time.perf_counter() - start, batches

    def _fits(self, batches: Sequence[Batch]) -> int | None:
        """The most rows that were in work together; None: this rank writes nothing, and may only be told the steps."""
        if not self._stream.writes:
            return None
        return max((batch.at_once or len(batch.generations) for batch in batches), default=0)

    def _summarise(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """What this rank's stream has generated, and the memory it took for it."""
        own = batches if self._stream.writes else []
        lengths = [[generation.generated_tokens for generation in batch.generations] for batch in own]
        peaks = [batch.peak_memory_bytes or 0 for batch in batches]
        return {
            "outcome": "ok",
            "rows": sum(map(len, lengths)),
            "generated": sum(map(sum, lengths)),
            "counted_by_seed": sum(len(each) * max(each, default=0) for each in lengths),
            "device_bytes": max(peaks, default=0) if self._device.type == "cuda" else None,
            "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts it in KiB
        }

    def _is_true_on_all(self, answer: bool) -> bool:
        """Whether it is true on every rank; waits for all of them. Through files: not all engines have a group."""
        self._barriers += 1
        world, folder = self._world, Path(self._task.folder)
        (folder / f"barrier-{self._barriers}-{world.rank}-{answer}").touch()
        waits = [folder / f"barrier-{self._barriers}-{rank}-" for rank in range(world.size)]
        answers: dict[Path, bool] = {}
        deadline = time.monotonic() + _BARRIER_SECONDS
        while len(answers) < world.size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the other ranks have not come to barrier {self._barriers}")
            every = product(waits, (True, False))
            answers |= {path: word for path, word in every if Path(f"{path}{word}").exists()}
            time.sleep(0.001)
        return all(answers.values())

    def _write_line(self, values: dict[str, Any]) -> None:
        with (Path(self._task.folder) / f"rank-{self._world.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
