"""What is said of a run before it begins: compared at every start, recorded, or shown by a dry run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
import sys

from batchgen import engines
from batchgen.redaction import redact
from batchgen.runs.prepare import Ready
from batchgen.runs.role import Role
from batchgen.types import FIT, Generation, SamplingParams

_ALWAYS_RECORDED = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
_LOOKED_AT = 100  # rows, by a dry run
_PACKAGES = ("batchgen", "torch", "transformers", "deepspeed", "accelerate", "datasets", "pyarrow", "tokenizers")


def identity(ready: Ready) -> dict[str, object]:
    """What decides the text of a run. It is compared at every start."""
    recipe = ready.settings.recipe
    return {
        "input": ready.source.digest,
        "rows": len(ready.source),
        "model": ready.model.name if ready.model.revision == "" else ready.model.revision,
        # Left out where there is none: run folders from before there was such a thing go on without it.
        **({"adapter": ready.model.adapter_revision} if ready.model.adapter else {}),
        **_adapters(ready),
        "dtype": ready.settled_dtype.recorded,
        **_sampling(recipe.sampling),
        # Null rather than left out: run folders from before it was asked do not have it.
        "generation_config": _where_from(recipe.generation_config),
        "prompt_column": recipe.prompt_column,
        "template": recipe.template,
        "chat_template_kwargs": dict(recipe.chat_template_kwargs),
        "truncate": recipe.truncate,
        **({} if recipe.id_prefix is None else {"id_prefix": recipe.id_prefix}),
        # Left out where nothing is split off: run folders from before there was such a thing go on without it.
        **{
            name: value
            for name, value in (("reasoning_parser", recipe.reasoning_parser), ("tool_parser", recipe.tool_parser))
            if value != "none"
        },
        **({"trusts_templates": True} if recipe.trusts_templates else {}),
        "request_model": recipe.model,
        "error_format": ready.settings.error_format,
    }


def _adapters(ready: Ready) -> dict[str, object]:
    """The adapters that rows may name, by these names; left out where there are none, as `adapter` is. An engine
    without a model has none of their revisions."""
    if not ready.settings.adapters:
        return {}
    known = {name: adapter.revision for name, adapter in ready.model.adapters.items()}
    return {"adapters": known or dict.fromkeys(ready.settings.adapters, "none")}


def _where_from(generation_config: str) -> str | None:
    if generation_config in ("auto", "none"):
        return None if generation_config == "none" else "auto"
    return os.path.abspath(generation_config)


def _sampling(params: SamplingParams) -> dict[str, object]:
    # The first ones are in every folder. The others are left out at their default, so that folders from before there
    # was such a parameter go on.
    recorded = {*_ALWAYS_RECORDED, *params.changed()}
    return {f"sampling.{name}": value for name, value in _values(params).items() if name in recorded}


def _values(params: SamplingParams) -> dict[str, object]:
    values = dataclasses.asdict(params)
    return values | {"max_new_tokens": "fit"} if params.max_new_tokens == FIT else values


def provenance(ready: Ready, role: Role) -> dict[str, object]:
    """What a start runs on. It is recorded with every attempt and never compared; secrets of the environment are left
    out."""
    environment = role.environment
    return {
        "model": ready.model.name,
        "model_folder": str(ready.model.folder),
        **({"adapter_folder": ready.model.adapter} if ready.model.adapter else {}),
        **(
            {"adapter_folders": {name: of.folder for name, of in ready.model.adapters.items()}}
            if ready.settings.adapters
            else {}
        ),
        "input_files": [redact(str(source.path.absolute()), environment) for source in ready.source.sources],
        "engine": ready.engine,
        "settings": engines.settings_of(ready.options),
        "engine_reason": ready.choice.why,
        "dtype": ready.dtype,
        "batch_size": ready.settings.batch_size,
        "ranks": role.ranks,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "command": [redact(word, environment) for word in sys.argv],
    }


def versions() -> dict[str, str]:
    """The versions of batchgen and of the packages that decide what a model says and how fast."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe(ready: Ready, ranks: int) -> str:
    """The plan of a dry run, with the first rendered prompt."""
    batch_size = ready.settings.batch_size
    lines = [
        f"input:    {len(ready.source)} rows in {len(ready.source.sources)} file(s)",
        f"model:    {ready.model.name} {ready.model.revision}".rstrip(),
        *([f"adapter:  {ready.model.adapter} {ready.model.adapter_revision}"] if ready.model.adapter else []),
        *(f"adapter:  {name} = {of.folder} {of.revision}" for name, of in ready.model.adapters.items()),
        f"engine:   {ready.engine} {json.dumps(engines.settings_of(ready.options))}",
        *([f"because:  {ready.choice.why}"] if ready.choice.why else []),
        f"dtype:    {ready.dtype}",
        f"batch:    {'as large as fits' if batch_size is None else f'at most {batch_size} prompts'}",
        f"ranks:    {ranks}",
        f"sampling: {json.dumps(_values(ready.settings.recipe.sampling), ensure_ascii=False)}",
    ]
    count = len(ready.source)
    window = list(ready.source.rows(range(min(count, _LOOKED_AT))))
    if count > len(window):
        lines.append(
            f"rows:     looked at the first {len(window)} of {count} rows; --engine echo --strict looks at all of them"
        )
    outcomes = ready.reader.read(window)
    for outcome in outcomes:
        if isinstance(outcome, Generation):
            assert outcome.error is not None
            lines.append(f"bad row:  {outcome.error.message}")
    first = next((outcome for outcome in outcomes if not isinstance(outcome, Generation)), None)
    if first is not None:
        lines += [f"first prompt ({first.id}, {len(first.tokens)} tokens):", first.text]
    return "\n".join(lines)
