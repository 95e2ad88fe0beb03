"""Everything before the first weight is loaded: the engine's name, the model's folder, the input, how rows are read.

What is wrong with the settings shows here, in seconds, on a machine without a GPU.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchgen import choice, formats, models
from batchgen import dtype as dtype_of
from batchgen.checkpoint import CheckpointError, Damaged, RunFolder, read_json, to_json, write_atomic
from batchgen.choice import AUTO, Choice
from batchgen.dtype import Dtype
from batchgen.engine import Encoder, Engine
from batchgen.formats import Begun, InputError
from batchgen.importing import without_garbage_collection
from batchgen.input import Input, files_of
from batchgen.models import ResolvedModel
from batchgen.openai import is_request
from batchgen.prompts import PromptReader, Recipe, own_id
from batchgen.schedule import windows
from batchgen.types import Generation, Prompt, RowError, UserError
from batchgen.world import World, from_environment

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "nf4")

# Bad rows that `--strict` names; of more, it says how many.
_NAMED = 20

_SAMPLE = 2_000  # rows whose lengths are looked at to choose an engine


class RunError(UserError):
    """The run could not start: a sentence for the person at the terminal."""


@dataclass(frozen=True)
class Ready:
    """A run before its engine exists."""

    source: Input
    recipe: Recipe
    reader: PromptReader
    model: ResolvedModel
    choice: Choice
    settled_dtype: Dtype
    batch_size: int | None
    selftest: bool
    cache: Path  # batchgen's own, not the run's
    answers_requests: bool  # the input is an OpenAI batch file, so that an unreadable line too gets OpenAI's answer

    @property
    def dtype(self) -> str:
        """What is computed in, as `--dtype` takes it."""
        return self.settled_dtype.name

    @property
    def engine(self) -> str:
        """Its name."""
        return self.choice.name

    @property
    def kind(self) -> type[Engine]:
        """The engine of that name."""
        return self.choice.kind

    @property
    def options(self) -> Any:
        """The engine's."""
        return self.choice.options


_NO_MODEL = ResolvedModel(Path(), "none", "")


def prepare(
    inputs: Sequence[str],
    folder: RunFolder,
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
    ranks: int = 1,
    begun: Mapping[str, Any] | None = None,
) -> Ready:
    """Opens the input and finds engine and model.

    Args:
        scan: read the input once and leave an index in the run folder.
        ranks: that this process will start.
        begun: what is recorded of the attempt that this process joins, which has chosen the engine if none was named.

    Raises:
        RunError, InputError, EngineError, ModelError: a sentence each.
    """
    chosen = _known(engine_name, settings, begun)
    if dtype not in DTYPES:
        raise RunError(f"there is no dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if batch_size is not None and batch_size < 1:
        raise RunError("the batch size must be 1 or more")
    cache = folder.input_cache
    source = _opened(inputs, cache, scan, folder.begun)
    own_cache = models.cache_folder(environment)
    resolved = _NO_MODEL
    if chosen is None or chosen.kind.needs_model:
        if model is None and scan:
            logger.info("no --model given: using the default model, %s", models.DEFAULT)
        resolved = models.resolve(model, own_cache, logger.info)
    dtype_found = dtype_of.find(dtype, folder, resolved.folder)
    if chosen is None:
        world = from_environment(environment)
        chosen = _chosen(resolved, dtype_found.name, settings, partial(_lengths, source, recipe), world, ranks)
    duplicates = _duplicates(source, cache / "duplicates.json", scan, folder.begun)
    encoder = chosen.kind.encoder(str(resolved.folder))
    try:
        reader = PromptReader(recipe, encoder, duplicates)
    except ValueError as error:  # the template is none
        raise RunError(str(error)) from error
    answers_requests = recipe.model is not None or _begins_with_request(source)
    return Ready(
        source,
        recipe,
        reader,
        resolved,
        chosen,
        dtype_of.settle(dtype_found, encoder, say=scan),
        batch_size,
        selftest,
        own_cache,
        answers_requests,
    )


def _opened(inputs: Sequence[str], cache: Path, scan: bool, begun: Begun) -> Input:
    source = Input.open(inputs, cache, scan=scan, begun=begun)
    if not len(source):  # a file that was never written, most likely
        raise InputError(f"there is no row in {', '.join(str(one.path) for one in source.sources[:5])}: it is empty")
    return source


def _known(name: str, settings: Sequence[str], begun: Mapping[str, Any] | None) -> Choice | None:
    """The engine that was named or is recorded; None: it is to be chosen."""
    if name != AUTO:
        return choice.named(name, settings)
    return None if begun is None else choice.recorded(begun)


def _chosen(
    model: ResolvedModel, dtype: str, settings: Sequence[str], lengths: choice.Lengths, world: World, ranks: int
) -> Choice:
    """The engine of a run for which none was named; says which, and why."""
    with without_garbage_collection():
        from batchgen.cards import Machine  # imports torch, and a run whose engine is named may need none

    several = world.size > 1  # else this process starts the ranks
    local_size = max(1, world.local_size) if several else ranks
    hosts = max(1, world.size // local_size) if several else 1
    machine = Machine.here(local_size)
    found = choice.automatic(model.folder, dtype, settings, lengths, machine, world.size if several else ranks, hosts)
    logger.info("engine %s: %s", found, found.why)
    return found


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
        prompts, count = _draw(source, recipe, encoder, most)
    return prompts, count, len(source)


def _draw(source: Input, recipe: Recipe, encoder: Encoder, most: int | None) -> tuple[list[Prompt], int]:
    count = len(source) if most is None else min(most, len(source))
    drawn = sorted(random.Random(1).sample(range(len(source)), count))
    try:
        reader = PromptReader(recipe, encoder, {})
    except ValueError as error:  # the template is none
        raise RunError(str(error)) from error
    parts = (reader.read(list(source.rows(window))) for window in windows(drawn, source.bytes_of))
    return [one for part in parts for one in part if isinstance(one, Prompt)], count


def _lengths(source: Input, recipe: Recipe, encoder: Encoder) -> tuple[list[tuple[int, int]], int]:
    """Prompt and new tokens of rows drawn from the input, and how many rows they stand for."""
    prompts, count = _draw(source, recipe, encoder, _SAMPLE)
    lengths = [(len(prompt.tokens), prompt.params.max_new_tokens) for prompt in prompts]
    return lengths, round(len(source) * len(prompts) / max(count, 1))


def _duplicates(source: Input, path: Path, scan: bool, begun: Begun) -> dict[int, str]:
    """Repeated ids, found once for the whole input: a rank that sees only its own rows could not find them."""
    try:
        known = read_json(path) if path.exists() else {}
    except Damaged:
        known = {}
    if scan and known.get("input", source.digest) != source.digest and begun():
        return {}  # this start will be refused, and others read what is there
    if known.get("input") != source.digest or known.get("checksum") != _checksum(known.get("rows")):
        if not scan:
            raise CheckpointError(f"{path} is of another input, or damaged; start again")
        found = {str(row): first for row, first in source.duplicates(own_id).items()}
        known = {"input": source.digest, "rows": found, "checksum": _checksum(found)}
        try:
            write_atomic(path, to_json(known))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}. Nothing has started") from error
    return {int(row): str(first) for row, first in known["rows"].items()}


def _checksum(rows: object) -> int:
    return zlib.crc32(json.dumps(rows).encode())


def _begins_with_request(source: Input) -> bool:
    for row in source.rows(range(min(len(source), 100))):
        if not isinstance(row.value, RowError):
            return is_request(row.value)
    return False


def refusals(ready: Ready) -> Iterator[Generation]:
    """Every row of the input that cannot become a prompt. Reads all of it."""
    for window in windows(range(len(ready.source)), ready.source.bytes_of):
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
