"""What an engine is told of a run, and whether it can do that: before any rank is started."""

from __future__ import annotations

from dataclasses import replace

from batchgen import packages
from batchgen.engine import Setup
from batchgen.engines import check_dtype
from batchgen.runs.prepare import Ready
from batchgen.runs.role import Role
from batchgen.world import World


def check_engine(ready: Ready, role: Role) -> None:
    """Raises PackageError or EngineError for what would end every rank alike, before one is started."""
    check_dtype(ready.kind, ready.dtype)  # that of the run, where none was typed
    packages.check_installed(ready.kind.packages(ready.options, ready.dtype), f"engine {ready.engine}")
    ranks = role.ranks_to_start
    all_ranks = replace(role.world, size=ranks, local_size=ranks) if role.is_single_process else role.world
    ready.kind.check(make_setup(ready, all_ranks), ready.tokenizer, ready.options)


def make_setup(ready: Ready, world: World) -> Setup:
    """What every engine is told of this run, as far as it is the same in all its attempts."""
    model = ready.model
    setup = Setup(str(model.folder), ready.dtype, ready.settings.batch_size, world, ready.settings.selftest)
    cache, adapters = str(ready.cache), model.adapter_folders
    return replace(setup, cache=cache, adapter=model.adapter, adapters=adapters, tokenizer=ready.tokenizer)
