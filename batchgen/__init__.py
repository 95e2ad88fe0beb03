"""Offline batch generation: every prompt of a file through a large model, exactly once, whatever dies on the way.

    from batchgen import Recipe, RunSettings, SamplingParams, run
    settings = RunSettings(recipe=Recipe(sampling=SamplingParams(max_new_tokens=64)))
    status = run("prompts.jsonl", "out", settings)

is the command `batchgen run prompts.jsonl -o out --max-new-tokens 64`; `FIT` is `--max-new-tokens fit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchgen.checkpoint import Status
    from batchgen.requests.recipe import Recipe
    from batchgen.runs.flow import merge, run
    from batchgen.runs.settings import Host, RunSettings
    from batchgen.types import FIT, Constraint, SamplingParams

__all__ = ["FIT", "Constraint", "Host", "Recipe", "RunSettings", "SamplingParams", "Status", "merge", "run"]

_HOMES = {
    "FIT": "types",
    "Constraint": "types",
    "Host": "runs.settings",
    "Recipe": "requests.recipe",
    "RunSettings": "runs.settings",
    "SamplingParams": "types",
    "Status": "checkpoint",
    "merge": "runs.flow",
    "run": "runs.flow",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `batchgen --help` imports this package too.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"batchgen.{_HOMES[name]}"), name)
