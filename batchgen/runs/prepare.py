"""Everything before the first weight is loaded: the engine's name, the model's folder, the input, how rows are read.

What is wrong with the settings shows here, in seconds, on a machine without a GPU.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from batchgen import models
from batchgen.checkpoint import RunFolder
from batchgen.engine import Engine, Tokenizer
from batchgen.formats import InputError
from batchgen.formats.input import Input, files_of, find
from batchgen.models import ResolvedModel
from batchgen.models.definition.adapter import find_adapter
from batchgen.models.generation_config import TAKEN_LATER, with_authors_sampling
from batchgen.packages import without_garbage_collection
from batchgen.planning import auto
from batchgen.planning.auto import AUTO, Choice
from batchgen.planning.work import Work
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.requests.row_ids import are_requests
from batchgen.runs import dtype as dtype_of
from batchgen.runs.dtype import Dtype
from batchgen.runs.duplicates import find_duplicates
from batchgen.runs.role import Role
from batchgen.runs.schedule import windows
from batchgen.runs.settings import RunError, RunSettings
from batchgen.types import Generation, Prompt

logger = logging.getLogger(__name__)

# Bad rows that `--strict` names; of more, it says how many.
_NAMED = 20

_FIRST = 100  # rows that are looked at to see whether they are request lines

_SAMPLE = 2_000  # rows whose lengths are looked at to choose an engine


@dataclass(frozen=True)
class Ready:
    """A run before its engine exists."""

    source: Input
    settings: RunSettings  # with the sampling of the model's author in its recipe, where that was asked for
    reader: PromptReader
    model: ResolvedModel
    choice: Choice
    settled_dtype: Dtype
    cache: Path  # batchgen's own, not the run's
    tokenizer: Tokenizer  # the model's
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
    settings: RunSettings,
    role: Role,
    *,
    scan_into: Path | None = None,
    claim: Mapping[str, Any] | None = None,
) -> Ready:
    """Opens the input and finds engine and model.

    Args:
        scan_into: read the input once, and leave an index in this folder until the run goes on with it (`Input.keep`);
            None: another process has read it, and the run folder has the index.
        claim: what is recorded of the attempt that this process joins: the engine that was chosen, if none was named.

    Raises:
        RunError, InputError, EngineError, ModelError: a sentence each.
    """
    choice = _named_or_recorded(settings, claim)
    says = scan_into is not None  # else another process has said it
    source = _open_input(inputs, folder, scan_into, lines=settings.recipe.model is not None)
    own_cache = models.cache_folder(role.environment)
    needs_model = choice is None or choice.kind.needs_model
    resolved = _resolve_model(settings, own_cache, say=says) if needs_model else _NO_MODEL
    if not needs_model:  # a rehearsal with engine echo finds out that they are not there
        for given in (*([] if settings.adapter is None else [settings.adapter]), *settings.adapters.values()):
            find_adapter(given)
    recipe = _with_sampling(settings.recipe, folder, "" if resolved is _NO_MODEL else str(resolved.folder), say=says)
    recipe = _with_parsers(recipe, folder, say=says)
    recipe = _with_adapters(recipe, settings, resolved)
    settings = replace(settings, recipe=recipe)
    dtype_found = dtype_of.find(settings.dtype, folder, resolved.folder)
    if choice is None:
        work = partial(_work, source, recipe)
        choice = _choose(resolved, dtype_found.name, settings.engine_settings, work, role)
    duplicates = find_duplicates(source, folder.input_cache, scan_into, recipe.id_prefix)
    answers_requests = recipe.model is not None or are_requests(source.rows(range(min(len(source), _FIRST))))
    try:
        tokenizer = choice.kind.tokenizer(str(resolved.folder))
        reader = PromptReader(recipe, tokenizer, duplicates, answers_requests)
    except ValueError as error:  # the template is none, or the model has no context to fit
        raise RunError(str(error)) from error
    if says:
        models.check_adapters(resolved.adapter or None, resolved.adapter_folders, resolved.folder, tokenizer)
    settled = dtype_of.settle(dtype_found, tokenizer, say=says)
    return Ready(source, settings, reader, resolved, choice, settled, own_cache, tokenizer, answers_requests)


def _open_input(inputs: Sequence[str], folder: RunFolder, into: Path | None, *, lines: bool) -> Input:
    originals = None if into is None else folder.originals()
    source = Input.open(inputs, folder.input_cache, scan=into is not None, into=into, originals=originals, lines=lines)
    if not len(source):  # a file that was never written, most likely
        raise InputError(f"there is no row in {', '.join(str(file.path) for file in source.sources[:5])}: it is empty")
    return source


def _resolve_model(settings: RunSettings, cache: Path, *, say: bool) -> ResolvedModel:
    if settings.model is None and say:
        logger.info("no --model given: using the default model, %s", models.DEFAULT)
    return models.resolve(settings.model, cache, logger.info, settings.adapter, settings.adapters)


def _with_adapters(recipe: Recipe, settings: RunSettings, model: ResolvedModel) -> Recipe:
    """The recipe with the names that rows may have for adapters, and requests for the model without one."""
    if not settings.adapters:
        return recipe
    given = settings.model or models.DEFAULT
    names = dict.fromkeys((given, given.partition("@")[0], model.name))
    return replace(recipe, adapters=tuple(settings.adapters), base_names=tuple(names))


def _with_sampling(recipe: Recipe, folder: RunFolder, model: str, *, say: bool) -> Recipe:
    """The recipe with the sampling of the model's author, unless the run began before there was such a thing."""
    if recipe.generation_config != "none" and folder.has_manifest():
        recorded = folder.read_identity()
        began_without = "generation_config" not in recorded and recorded.get("request_model") is not None
        if recipe.generation_config == "auto" and began_without:
            if say:
                logger.info("this run began without the model's generation_config.json, and goes on without it")
            recipe = replace(recipe, generation_config="none")
        # What is at its default is not recorded: the run has not taken it, or it began before that was taken.
        left_out = {name for name in TAKEN_LATER if f"sampling.{name}" not in recorded}
        recipe = replace(recipe, set_by_user=recipe.set_by_user | left_out)
    return with_authors_sampling(recipe, model, say=say)


def _with_parsers(recipe: Recipe, folder: RunFolder, *, say: bool) -> Recipe:
    """The recipe without what the run does not know that began before texts were split into answer, thinking and calls
    of tools."""
    if not folder.has_manifest():
        return recipe
    recorded = folder.read_identity()
    if "reasoning_parser" not in recorded and recipe.reasoning_parser == "auto":
        if say:
            logger.info("this run began with --reasoning-parser none, and goes on with it")
        recipe = replace(recipe, reasoning_parser="none")
    if "tool_parser" not in recorded and recipe.tool_parser == "auto":
        if say:
            logger.info("this run began with --tool-parser none, and goes on with it")
        recipe = replace(recipe, tool_parser="none")
    return recipe


def _named_or_recorded(settings: RunSettings, claim: Mapping[str, Any] | None) -> Choice | None:
    """The engine that was named, or that is recorded; None: it is to be chosen."""
    if settings.engine != AUTO:
        return auto.choose_named(settings.engine, settings.engine_settings, settings.dtype)
    return None if claim is None else auto.read_recorded_choice(claim)


def _choose(model: ResolvedModel, dtype: str, settings: Sequence[str], work: auto.Measure, role: Role) -> Choice:
    """The engine of a run for which none was named; says which, and why."""
    with without_garbage_collection():
        from batchgen.planning.hardware import Machine, Nodes  # torch, and a run whose engine is named may need none

    world = role.world
    local_size = role.ranks_to_start if role.is_single_process else max(1, world.local_size)
    hosts = 1 if role.is_single_process else max(1, world.size // local_size)
    nodes = Nodes(Machine.here(local_size), role.ranks, hosts)
    choice = auto.choose_fastest(model.folder, dtype, settings, work, nodes, by_row=bool(model.adapters))
    logger.info("engine %s: %s", choice, choice.why)
    return choice


def check_there(
    inputs: Sequence[str],
    model: str | None,
    adapter: str | None = None,
    adapters: Mapping[str, str] = models.NO_ADAPTERS,
    lines: bool = False,
) -> None:
    """Whether input, model and adapters are here, without reading them: what a job would find out after hours.

    With `lines`, a file is an OpenAI batch file whatever it is called.

    Raises:
        InputError, ModelError: a sentence each.
    """
    for path in files_of(inputs):
        find(path, lines)
    models.check_there(model, adapter, adapters)


def sample(
    inputs: Sequence[str], recipe: Recipe, tokenizer: Tokenizer, max_rows: int | None
) -> tuple[list[Prompt], int, int]:
    """Prompts of rows drawn from the input, always the same ones; how many rows were drawn, and of how many.

    Rows that cannot become a prompt are left out.

    Args:
        max_rows: how many rows to draw; None: all.

    Raises:
        InputError: a sentence.
    """
    with tempfile.TemporaryDirectory(prefix="batchgen-") as scratch:
        source = Input.open(inputs, Path(scratch), scan=True)
        prompts, count = _draw(source, recipe, tokenizer, max_rows, warns=True)
    return prompts, count, len(source)


def _draw(
    source: Input, recipe: Recipe, tokenizer: Tokenizer, max_rows: int | None, *, warns: bool
) -> tuple[list[Prompt], int]:
    count = len(source) if max_rows is None else min(max_rows, len(source))
    drawn = sorted(random.Random(1).sample(range(len(source)), count))
    try:
        reader = PromptReader(recipe, tokenizer, {}, warns=warns)
    except ValueError as error:  # the template is none
        raise RunError(str(error)) from error
    parts = (reader.read(list(source.rows(window))) for window in windows(drawn, source.bytes_of))
    return [prompt for part in parts for prompt in part if isinstance(prompt, Prompt)], count


def _work(source: Input, recipe: Recipe, tokenizer: Tokenizer) -> Work:
    """The lengths of rows drawn from the input."""
    prompts, count = _draw(source, recipe, tokenizer, _SAMPLE, warns=False)  # the reader of all rows does
    return Work.of(prompts, count, len(source))


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
