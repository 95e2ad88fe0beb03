"""Options that several commands share: those of the engine that does the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import click

from batchgen import engines
from batchgen.models.footprint import KV_DTYPES
from batchgen.planning.auto import AUTO
from batchgen.runs.watchdog import STALL_SECONDS

_SHORT_FORMS = ("offload", "tp", "kv_dtype")  # flags that are `--set NAME=VALUE`: the engine says whether it knows them

_ENGINE_OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice([AUTO, *engines.names()]),
        default=AUTO,
        show_default=True,
        help="The engine that generates; auto takes the one that is forecast to be the fastest that fits.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set one of the engine's settings. Give an unknown name to see the list.",
    ),
    click.option(
        "--offload",
        metavar="cpu|nvme=FOLDER",
        help="Where the weights wait until they are computed with (ds-zero). Short for --set offload=….",
    ),
    click.option(
        "--tp",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many ranks share a model (ds-inference, paged); this many are started. Short for --set tp=N.",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(KV_DTYPES),
        help="The number type of the KV cache (paged); fp8 has room for nearly twice the rows, and loses precision. "
        "Short for --set kv_dtype=….",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="The most prompts in a batch; unless it is given, a batch has as many as fit.",
    ),
    click.option(
        "--selftest/--no-selftest",
        default=True,
        show_default=True,
        help="Compare rows of the first batch with the same rows generated alone; stop if their texts differ.",
    ),
    click.option(
        "--ranks",
        "--gpus",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many processes to start on this host, one for each GPU; unless it is given, 1 or the value of --tp. "
        "It is ignored where torchrun or srun has started the processes.",
    ),
    click.option(
        "--stall-seconds",
        type=click.FloatRange(min=0),
        default=STALL_SECONDS,
        show_default=True,
        help="After this many seconds without a step, log the stacks of all ranks and exit, resumable; 0: never.",
    ),
)


class Adapters(NamedTuple):
    """What `--adapter` names, as often as it is given."""

    merged: str | None  # the folder of the one that is given without a name
    named: dict[str, str]  # the folders of those that rows may name, by these names


def _read_adapters(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Adapters:
    """The adapters that are written as FOLDER or NAME=FOLDER; a folder of that very name wins."""
    merged: str | None = None
    named: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or os.path.isdir(os.path.expanduser(text)):
            if merged is not None:
                raise click.BadParameter(
                    f"{merged} and {text} have no names, and one adapter can be merged for all rows. With "
                    "NAME=FOLDER, each row may name one of several"
                )
            merged = text
        elif not name or not folder:
            raise click.BadParameter(f"{text!r} is neither FOLDER nor NAME=FOLDER")
        elif name in named:
            raise click.BadParameter(f"the name {name} is given to {named[name]} and to {folder}; give each its own")
        else:
            named[name] = folder
    return Adapters(merged, named)


def adapter_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The adapters, for the commands that run a model or check one."""

    @wraps(command)
    def spelled_out(*arguments: Any, adapter: Adapters, **options: Any) -> Any:
        return command(*arguments, adapter=adapter.merged, adapters=adapter.named, **options)

    return click.option(
        "--adapter",
        multiple=True,
        metavar="FOLDER|NAME=FOLDER",
        callback=_read_adapters,
        help="A LoRA adapter that peft has saved. Without a name it is merged into the model's weights as they are "
        "loaded; with one, which may be given several times, a row may name it (engine paged).",
    )(spelled_out)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What does the work: shared by `run` and `run-batch`."""

    @wraps(command)
    def spelled_out(*arguments: Any, settings: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SHORT_FORMS}
        # An engine without a setting may be told that it is auto.
        short = [f"{name}={value}" for name, value in given.items() if value not in (None, AUTO)]
        options["ranks"] = options["ranks"] or given["tp"] or 1
        return command(*arguments, settings=(*short, *settings), **options)

    return add_options(spelled_out, _ENGINE_OPTIONS)


def add_options(command: Callable[..., Any], options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The command with these options of Click, which its help lists in their order."""
    for option in reversed(options):
        command = option(command)
    return command
