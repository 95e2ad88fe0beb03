"""What a run is told: `RunSettings` says what it does, `Host` where and how it is carried out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from batchgen.checkpoint import HEARTBEAT_SECONDS, Attempt, Done
from batchgen.engine import DTYPES
from batchgen.planning.auto import AUTO
from batchgen.requests.output import ErrorFormat
from batchgen.requests.recipe import Recipe
from batchgen.runs.watchdog import STALL_SECONDS
from batchgen.types import WHOLE, Shard, UserError

OutputFormat = Literal["jsonl", "parquet", "arrow"]


class RunError(UserError):
    """The run could not start: a sentence for the person at the terminal."""


@dataclass(frozen=True)
class RunSettings:
    """What a run does with its input.

    Args:
        recipe: how rows become prompts, and the sampling parameters for what the rows do not set themselves.
        model: a folder, `ORG/NAME[@REVISION]` of a hub model on this machine, or None for the default model.
        adapter: the folder of a LoRA adapter that is merged into the model as it is loaded; None: no adapter.
        adapters: the folders of LoRA adapters of which a row may name one, by these names; engine `paged` has them.
        engine: a name of `batchgen.engines.names()`; auto: of the engines that know the settings and fit, the one that
            a forecast says is the fastest (`batchgen.planning.auto`).
        engine_settings: `name=value` for the engine's `Options`.
        dtype: auto, float32, bfloat16, float16, fp8, int8, int4 or nf4.
        batch_size: the most prompts in a batch; None: as many as fit.
        selftest: compare rows of the first batch with themselves alone, and stop if the batch has changed them.
        strict: check every row before the model loads, and raise RunError if one is bad.
        max_error_rate: the run stops once more than this share (0 to 1) of a stream's rows have failed.
        output_format: of the merged generations.
        error_format: of the answers to OpenAI lines that fail.

    Raises:
        RunError: a value is out of its range.
    """

    recipe: Recipe = field(default_factory=Recipe)
    model: str | None = None
    adapter: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    engine: str = AUTO
    engine_settings: Sequence[str] = ()
    dtype: str = "auto"
    batch_size: int | None = None
    selftest: bool = True
    strict: bool = False
    max_error_rate: float = 1.0
    output_format: OutputFormat = "jsonl"
    error_format: ErrorFormat = "openai"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RunError(f"there is no dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise RunError("the batch size must be 1 or more")
        if self.adapter is not None and self.adapters:
            raise RunError(
                "an adapter is merged for all rows, or rows name one of several, and both are given: --adapter FOLDER "
                "merges one; with a name for each, --adapter NAME=FOLDER, a row may have one of them"
            )


@dataclass(frozen=True)
class Host:
    """Where and how a run is carried out: what the command line knows and an ordinary caller need not say.

    Args:
        environment: the variables of the launcher (torchrun, srun, `deepspeed`).
        ranks: processes to start on this host with `rank_command`; 1: the calling process does the work itself.
        rank_command: the arguments of `python -m batchgen` that start one rank.
        shard: the part of the input that this start does; other starts do the rest, at the same time.
        heartbeat_seconds: between heartbeats; after 18 missed ones, another host may take the run over.
        stall_seconds: without a step, the process ends with exit code 75, whoever called it; 0: never.
        watch: shows the progress of an attempt while it is entered; None: nothing is shown.

    Raises:
        ValueError: there are several ranks and no command that starts one.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    ranks: int = 1
    rank_command: Sequence[str] = ()
    shard: Shard = WHOLE
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    stall_seconds: float = STALL_SECONDS
    watch: Callable[[Attempt, Done], AbstractContextManager[object]] | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or (self.ranks > 1 and not self.rank_command):
            raise ValueError("ranks must be 1, or more with the rank_command that starts one of them")
