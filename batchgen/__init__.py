"""Offline batch generation: every prompt of a file through a large model, exactly once, whatever dies on the way.

    from batchgen import Recipe, SamplingParams, run
    status = run("prompts.jsonl", "out", recipe=Recipe(sampling=SamplingParams(max_new_tokens=64)))

is the command `batchgen run prompts.jsonl -o out --max-new-tokens 64`; `FIT` is `--max-new-tokens fit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchgen.checkpoint import Status
    from batchgen.requests.recipe import Recipe
    from batchgen.runs.flow import Host, merge, run
    from batchgen.types import FIT, SamplingParams

__all__ = ["FIT", "Host", "Recipe", "SamplingParams", "Status", "merge", "run"]

_HOMES = {
    "FIT": "types",
    "Host": "runs.flow",
    "Recipe": "requests.recipe",
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
