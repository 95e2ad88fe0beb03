"""Everything before the first weight is loaded: the engine's name, the model's folder, the input, how rows are read.

What is wrong with the settings shows here, in seconds, on a machine without a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import random
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen import engine, formats, models
from batchgen.checkpoint import CheckpointError, read_json, to_json, write_atomic
from batchgen.engine import Encoder, Engine
from batchgen.input import Input, files_of
from batchgen.models import ResolvedModel
from batchgen.openai import is_request
from batchgen.prompts import PromptReader, Recipe, own_id
from batchgen.schedule import windows
from batchgen.types import Generation, Prompt, RowError, UserError

logger = logging.getLogger(__name__)

_PACKAGES = ("batchgen", "torch", "transformers", "deepspeed", "accelerate", "datasets", "pyarrow", "tokenizers")

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "nf4")

# Bad rows that `--strict` names; of more, it says how many.
_NAMED = 20


class RunError(UserError):
    """The run could not start: a sentence for the person at the terminal."""


@dataclass(frozen=True)
class Ready:
    """A run before its engine exists."""

    source: Input
    recipe: Recipe
    reader: PromptReader
    model: ResolvedModel
    engine: str
    kind: type[Engine]  # of that name
    options: Any  # of that kind
    dtype: str
    batch_size: int | None
    selftest: bool
    cache: Path  # batchgen's own, not the run's
    answers_requests: bool  # the input is an OpenAI batch file, so that an unreadable line too gets OpenAI's answer


_NO_MODEL = ResolvedModel(Path(), "none", "")


def prepare(
    inputs: Sequence[str],
    cache: Path,
    recipe: Recipe,
    environment: Mapping[str, str],
    model: str | None,
    engine_name: str,
    settings: Sequence[str],
    dtype: str,
    batch_size: int | None,
    *,
    scan: bool,
    selftest: bool = True,
) -> Ready:
    """Opens the input and finds engine and model; `scan` reads the input once and leaves an index in `cache`.

    Raises:
        RunError, InputError, EngineError, ModelError: a sentence each.
    """
    kind = engine.find(engine_name)
    options = engine.parse_options(kind, settings)
    if dtype not in DTYPES:
        raise RunError(f"there is no dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if batch_size is not None and batch_size < 1:
        raise RunError("the batch size must be 1 or more")
    source = Input.open(inputs, cache, scan=scan)
    own_cache = models.cache_folder(environment)
    resolved = _NO_MODEL
    if kind.needs_model:
        if model is None and scan:
            logger.info("no --model given: using the default model, %s", models.DEFAULT)
        resolved = models.resolve(model, own_cache, logger.info)
    duplicates = _duplicates(source, cache / "duplicates.json", scan)
    try:
        reader = PromptReader(recipe, kind.encoder(str(resolved.folder)), duplicates)
    except ValueError as error:  # the template is none
        raise RunError(str(error)) from error
    answers_requests = recipe.model is not None or _begins_with_request(source)
    return Ready(
        source,
        recipe,
        reader,
        resolved,
        engine_name,
        kind,
        options,
        dtype,
        batch_size,
        selftest,
        own_cache,
        answers_requests,
    )


def check_there(inputs: Sequence[str], model: str | None) -> None:
    """Whether input and model are on this machine, without reading them: what a job would find out after hours.

    Raises:
        InputError, ModelError: a sentence each.
    """
    for path in files_of(inputs):
        formats.find(path)
    models.check_there(model)


def sample(inputs: Sequence[str], recipe: Recipe, encoder: Encoder, most: int | None) -> tuple[list[Prompt], int, int]:
    """Prompts of rows drawn from the input, always the same ones; how many rows were drawn, and of how many.

    Rows that cannot become a prompt are left out.

    Args:
        most: rows to draw; None: all.

    Raises:
        InputError: a sentence.
    """
    with tempfile.TemporaryDirectory(prefix="batchgen-") as scratch:
        source = Input.open(inputs, Path(scratch), scan=True)
        count = len(source) if most is None else min(most, len(source))
        chosen = sorted(random.Random(1).sample(range(len(source)), count))
        outcomes = PromptReader(recipe, encoder, {}).read(list(source.rows(chosen)))
    return [one for one in outcomes if isinstance(one, Prompt)], count, len(source)


def _duplicates(source: Input, path: Path, scan: bool) -> dict[int, str]:
    """Repeated ids, found once for the whole input: a rank that sees only its own rows could not find them."""
    known = read_json(path) if path.exists() else {}
    if known.get("input") != source.digest:
        if not scan:
            raise CheckpointError(f"{path} is of another input; start again")
        found = source.duplicates(own_id)
        known = {"input": source.digest, "rows": found}
        try:
            write_atomic(path, to_json(known))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}. Nothing has started") from error
    return {int(row): str(first) for row, first in known["rows"].items()}


def _begins_with_request(source: Input) -> bool:
    for row in source.rows(range(min(len(source), 100))):
        if not isinstance(row.value, RowError):
            return is_request(row.value)
    return False


def asked(ready: Ready, error_format: str) -> dict[str, object]:
    """What decides the text of a run: compared at every start."""
    recipe = ready.recipe
    return {
        "input": ready.source.digest,
        "rows": len(ready.source),
        "model": ready.model.name if ready.model.revision == "" else ready.model.revision,
        "dtype": ready.dtype,
        **{f"sampling.{name}": value for name, value in dataclasses.asdict(recipe.sampling).items()},
        "prompt_column": recipe.prompt_column,
        "template": recipe.template,
        "chat_template_kwargs": dict(recipe.chat_template_kwargs),
        "truncate": recipe.truncate,
        "request_model": recipe.model,
        "error_format": error_format,
    }


def facts(ready: Ready, ranks: int) -> dict[str, object]:
    """What a run runs on: recorded with every attempt, never compared."""
    return {
        "model": ready.model.name,
        "model_folder": str(ready.model.folder),
        "input_files": [str(source.path.absolute()) for source in ready.source.sources],
        "engine": ready.engine,
        "settings": engine.settings_of(ready.options),
        "batch_size": ready.batch_size,
        "ranks": ranks,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "command": sys.argv,
    }


def versions() -> dict[str, str]:
    """Of batchgen and the packages that decide what a model says and how fast."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def refusals(ready: Ready) -> Iterator[Generation]:
    """Every row of the input that cannot become a prompt. Reads all of it."""
    for window in windows(iter(range(len(ready.source)))):
        for outcome in ready.reader.read(list(ready.source.rows(window))):
            if isinstance(outcome, Generation):
                yield outcome


def check_all(ready: Ready) -> None:
    """What `--strict` does.

    Raises:
        RunError: rows are bad; the message names the first of them.
    """
    named: list[str] = []
    count = 0
    for refused in refusals(ready):
        count += 1
        if refused.error is not None and len(named) < _NAMED:
            named.append(f"  {refused.error.message}")
    if count:
        more = f"\n  … and {count - len(named)} more" if count > len(named) else ""
        raise RunError(
            f"{count} of {len(ready.source)} rows are bad, and --strict was given; nothing was generated:\n"
            + "\n".join(named)
            + more
        )


def describe(ready: Ready, ranks: int) -> str:
    """The plan of a dry run, with the first rendered prompt."""
    lines = [
        f"input:    {len(ready.source)} rows in {len(ready.source.sources)} file(s)",
        f"model:    {ready.model.name} {ready.model.revision}".rstrip(),
        f"engine:   {ready.engine} {json.dumps(engine.settings_of(ready.options))}",
        f"dtype:    {ready.dtype}",
        f"batch:    {'as large as fits' if ready.batch_size is None else f'at most {ready.batch_size} prompts'}",
        f"ranks:    {ranks}",
        f"sampling: {json.dumps(dataclasses.asdict(ready.recipe.sampling), ensure_ascii=False)}",
    ]
    window = list(ready.source.rows(range(min(len(ready.source), 100))))
    outcomes = ready.reader.read(window)
    for outcome in outcomes:
        if isinstance(outcome, Generation):
            assert outcome.error is not None
            lines.append(f"bad row:  {outcome.error.message}")
    first = next((outcome for outcome in outcomes if not isinstance(outcome, Generation)), None)
    if first is not None:
        lines += [f"first prompt ({first.id}, {len(first.tokens)} tokens):", first.text]
    return "\n".join(lines)
