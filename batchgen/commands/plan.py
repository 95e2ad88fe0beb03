"""`batchgen plan`: a forecast from a model's config and an input's lengths."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchgen.commands import fail, log_to_stderr, results_only_on_stdout
from batchgen.commands._options import adapter_option
from batchgen.commands._sampling import sampling_options, sampling_words
from batchgen.commands._values import template_text
from batchgen.commands.run import recipe_of
from batchgen.models.footprint import AUTO, KV_DTYPES, find_cache_format

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchgen.planning import forecast as plans

logger = logging.getLogger(__name__)

_SAMPLE = 20_000  # rows whose lengths are looked at
_BYTES_PER_TOKEN = 4  # of English text, where no tokenizer says


@click.command("plan")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option(
    "--model",
    required=True,
    metavar="MODEL|SHAPE",
    help="The model, as for `run`; or a config.json; or the name of a shape, like llama-70b.",
)
@adapter_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "fp8", "int8", "int4"]),
    default="bfloat16",
    show_default=True,
    help="The number type of the weights; with fp8, int8 and int4 the rest is bfloat16.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    default=AUTO,
    show_default=True,
    help="The number type of the KV cache, as for `run`; fp8 leaves engine paged alone.",
)
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many GPUs one node has.")
@click.option("--gpu", metavar="NAME", help="The kind of GPU: H100, H200, A100-80, A100-40, A6000, L40S or V100.")
@click.option(
    "--gpu-memory", type=click.FloatRange(min=1), metavar="GIB", help="The memory of each GPU as it is sold, in GiB."
)
@click.option("--host-memory", type=click.FloatRange(min=1), metavar="GB", help="The host memory of the node, in GB.")
@click.option(
    "--bench",
    "bench_folder",
    metavar="FOLDER",
    help="A folder of `batchgen bench` that was measured with this model on such a GPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@sampling_options
@click.option("--prompt-column", metavar="NAME", help="The column that holds the prompt, as for `run`.")
@click.option(
    "--template", metavar="TEXT|@FILE", callback=template_text, help="A template of the prompt, as for `run`."
)
def command(inputs: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say what fits, how large a batch and how long, before any weight is loaded.

    For each engine it says whether the model fits, how large a batch of the longest rows can be, what memory it takes,
    how many tokens are generated in a second, and how long the whole input takes if every row generates as much as it
    may. It needs no GPU and no weights, only a model's config or the name of a shape (bloom-560m, bloom-7b1,
    bloom-176b, llama-8b, llama-70b, qwen3-0.6b, qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, gemma3-12b,
    deepseek-v2-lite). Of a mixture of experts, a decode step is counted with the experts that its rows are expected to
    need; a layer with a window, with the tokens in it.
    """
    from batchgen.types import UserError

    log_to_stderr(0, 1)
    options["constraint_files"] = {name: options[name] for name in ("json_schema", "grammar")}
    recipe = options["recipe"] = recipe_of(options)
    try:
        with results_only_on_stdout():
            work, note, forecasts, node, model = _planned(inputs, recipe, options)
    except UserError as error:
        raise fail(error) from error
    if as_json:
        values = [dataclasses.asdict(forecast) for forecast in forecasts]
        described = {"rows": work.rows, "lengths": note, "model": _sizes(model), "forecasts": values}
        click.echo(json.dumps(described, indent=1))
    else:
        options["size"] = str(model)
        click.echo("\n".join(_text(inputs, work, note, forecasts, node, options)))


def _sizes(model: plans.Model) -> dict[str, Any]:
    """What --json says about the model."""
    from batchgen.models.footprint import CacheFormat
    from batchgen.planning.description import list_cache_kinds

    weights = model.whole
    cache = list_cache_kinds(model.footprint, model.cache or CacheFormat(model.dtype.itemsize))
    return {"parameters": weights.total, "active_parameters": weights.active, "kv_cache": cache}


def _planned(inputs: Sequence[str], recipe: Any, options: dict[str, Any]) -> Any:
    import torch

    from batchgen import models
    from batchgen.models import shapes
    from batchgen.models.quantised import rounding
    from batchgen.planning import forecast, hardware

    name = options["model"]
    if name == models.DEFAULT:
        name = str(models.resolve(name, models.cache_folder(os.environ), logger.info).folder)
    config, folder = shapes.find(name)
    _check_adapters(options["adapter"], options["adapters"], folder)
    if options["adapters"]:  # a row may name one, and a request the model, as in a run
        given = options["model"]
        names = (given, given.partition("@")[0], Path(given).name)
        recipe = dataclasses.replace(recipe, adapters=tuple(options["adapters"]), base_names=names)
    work, note = _work(inputs, recipe, folder)
    host = options["host_memory"]
    card = hardware.card_of(options["gpu"], options["gpu_memory"])
    node = forecast.Node(card, options["gpus"], None if host is None else int(host * 1e9))
    _check_types(config, card, options)
    is_rounded = options["dtype"] in rounding.DTYPES
    dtype = torch.bfloat16 if is_rounded else getattr(torch, options["dtype"])
    cache = find_cache_format(options["kv_dtype"])
    model = forecast.Model.of(config, dtype, options["dtype"] if is_rounded else "", cache=cache)
    measured = _measured(options["bench_folder"], options)
    return work, note, forecast.forecasts(model, work, node, measured, _list_engines(options)), node, model


def _check_types(config: Any, card: Any, options: Mapping[str, Any]) -> None:
    """Raises PlanError if the weights or the cache cannot be of the types that the options name: a run would say so."""
    from batchgen.models.quantised import get_settings, has_quantised_weights, rounding
    from batchgen.planning import forecast

    dtype = options["dtype"]
    if dtype in rounding.DTYPES and has_quantised_weights(config):
        raise forecast.PlanError(
            f"the weights of {options['model']} are quantised already ({get_settings(config).get('quant_method')}, by "
            f"quantization_config in its config.json), and are not rounded again: leave --dtype {dtype} out"
        )
    for option, advice in (("dtype", "use int8 or int4"), ("kv_dtype", "leave it out")):
        if options[option] == "fp8" and not card.fp8:
            raise forecast.PlanError(
                f"--{option.replace('_', '-')} fp8 takes a GPU that knows 8-bit floats, as those of 2022 and later do, "
                f"and this one ({options['gpu'] or 'the known one with the nearest memory'}) does not; {advice}"
            )


def _list_engines(options: Mapping[str, Any]) -> list[str]:
    """The engines that can do what the options ask for."""
    from batchgen import engines

    names = [name for name in engines.names() if options["dtype"] in engines.find(name).dtypes]
    if options["adapters"]:
        names = [name for name in names if engines.find(name).takes_adapters]
    if options["kv_dtype"] != AUTO:
        names = [name for name in names if "kv_dtype" in engines.list_settings(engines.find(name))]
    return names


def _check_adapters(adapter: str | None, adapters: Mapping[str, str], folder: Path | None) -> None:
    """Raises ModelError if there is an adapter that is none, or does not fit the model in `folder`, if that is here. A
    merged model needs the memory and the time of the model alone; those of adapters that rows name are left out."""
    from batchgen import models
    from batchgen.models.definition.adapter import find_adapter

    for given in (*([] if adapter is None else [adapter]), *adapters.values()):
        find_adapter(given)
    if folder is not None and (adapter is not None or adapters):
        from batchgen.models.tokenizer import HfTokenizer

        models.check_adapters(adapter, adapters, folder, HfTokenizer(str(folder)))


def _work(inputs: Sequence[str], recipe: Any, folder: Path | None) -> tuple[plans.Work, str]:
    """The lengths of the rows, and how they were found."""
    from batchgen.engines import find
    from batchgen.planning import forecast
    from batchgen.runs.prepare import sample

    tokenizer = find("accelerate").tokenizer(str(folder)) if folder is not None else find("echo").tokenizer("")
    prompts, count, total = sample(inputs, recipe, tokenizer, _SAMPLE)
    if not prompts:
        raise forecast.PlanError("no row of the input can become a prompt; batchgen run --dry-run says why")
    scale = 1 if folder is not None else _BYTES_PER_TOKEN
    note = (
        "as the model's tokenizer has them" if folder is not None else "estimated at 4 bytes a token: no tokenizer here"
    )
    if count < total:
        note += f"; of {count:,} rows drawn from {total:,}"
    return forecast.Work.of(prompts, count, total, scale), note


def _measured(name: str | None, options: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Seconds of a decode step by system and batch, of a bench; a warning if it may be one of another model."""
    if name is None:
        return {}
    from batchgen.bench.results import Folder

    folder = Folder(Path(name))
    identity = folder.read_manifest()["asked"]
    model, dtype = str(identity["model"]).removeprefix("random weights of "), identity["dtype"]
    if Path(model).name != Path(options["model"]).name or dtype not in ("auto", options["dtype"]):
        logger.warning(
            "%s was measured with %s in %s, and this forecast is for %s in %s: its steps are taken as they are",
            name, model, dtype, options["model"], options["dtype"],
        )  # fmt: skip
    step_seconds: dict[str, dict[int, float]] = {}
    for result in folder.results():
        name, *settings = result.system.split(":")
        cache = [setting for setting in settings if setting.startswith("kv_dtype=")]
        if (cache or [f"kv_dtype={AUTO}"]) != [f"kv_dtype={options['kv_dtype']}"]:
            continue
        system = ":".join([name, *(setting for setting in settings if setting not in cache)])
        if result.outcome == "ok" and result.ranks == options["gpus"] and result.batch and result.decode_steps > 0:
            step_seconds.setdefault(system, {})[result.batch] = result.step_seconds
    return step_seconds


def _text(
    inputs: Sequence[str],
    work: plans.Work,
    note: str,
    forecasts: Sequence[plans.Forecast],
    node: plans.Node,
    options: dict[str, Any],
) -> Iterator[str]:
    from batchgen.planning.hardware import nearest_card
    from batchgen.runs.progress import duration

    prompts, new = (sum(length[place] for length in work.lengths) / len(work.lengths) for place in (0, 1))
    yield f"{work.rows:,} rows of {prompts:,.0f} prompt tokens and up to {new:,.0f} new ones, on the average ({note})"
    sold = options["gpu_memory"]
    memory = f"{node.card.memory / 1e9:,.0f} GB" if sold is None else f"{sold:g} GiB"
    yield f"{options['model']} in {options['dtype']} on {node.gpus} GPU(s) of {memory}"
    yield options["size"]
    if options["gpu"] is None and sold is None:
        yield "no --gpu was given: an H100 is assumed"
    elif options["gpu"] is None:
        yield f"no --gpu was given: the speeds are those of the {nearest_card(sold)}, whose memory is the nearest"
    if not node.card.measured:
        yield "the speeds of this GPU are its maker's, less a tenth: expect less"
    for forecast in forecasts:
        place = forecast.placement
        name = " ".join([forecast.engine, *place.settings]) + f", {place.ranks} rank(s)"
        if forecast.why_not:
            yield f"  {name}: does not fit: {forecast.why_not}"
            continue
        where = f", {place.host / 1e9:,.0f} GB of host memory" if place.host else ""
        where += f", {place.disk / 1e9:,.0f} GB of disk" if place.disk else ""
        speed = f"{forecast.tokens_per_second:,.0f} tokens/s, {duration(forecast.seconds)}, most of it {forecast.bound}"
        size = f"{forecast.device_bytes / 1e9:,.1f} GB a GPU{where}"
        yield f"  {name}, {place.streams} stream(s): batches of up to {forecast.batch} rows, {speed}; {size}"
    if forecasts and not forecasts[0].why_not:
        yield f"the fastest that fits: {_command(inputs, forecasts[0], options)}"
    else:
        yield "nothing fits: more GPUs, GPUs with more memory, or shorter rows"


def _command(inputs: Sequence[str], best: plans.Forecast, options: dict[str, Any]) -> str:
    from batchgen.models import shapes

    name = options["model"]
    model = "MODEL" if name in shapes.SHAPES or Path(name).is_file() else name  # neither of them can be run
    words = ["batchgen", "run", *inputs, "--model", model, "--dtype", options["dtype"]]
    words += [] if options["adapter"] is None else ["--adapter", options["adapter"]]
    words += [word for name, folder in options["adapters"].items() for word in ("--adapter", f"{name}={folder}")]
    recipe = options["recipe"]
    words += sampling_words(recipe.sampling, options["constraint_files"])
    for name in ("prompt_column", "template"):
        value = getattr(recipe, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", value]
    words += ["--engine", best.engine]
    words += [] if options["kv_dtype"] == AUTO else ["--kv-dtype", options["kv_dtype"]]
    for setting in best.placement.settings:
        words += ["--set", setting]
    words += ["--gpus", str(best.placement.ranks)] if best.placement.ranks > 1 else []
    return shlex.join(words)
