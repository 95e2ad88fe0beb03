"""Options that several commands share: those of sampling, and those of the engine that does the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from batchgen import engines
from batchgen.commands._values import TokenLimit, stop_texts
from batchgen.planning.auto import AUTO
from batchgen.runs.watchdog import STALL_SECONDS
from batchgen.types import SamplingParams


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `SamplingParams`, each with the default that stands there."""
    defaults = SamplingParams
    for option in reversed(
        (
            click.option(
                "--max-new-tokens",
                type=TokenLimit(),
                metavar="N|fit",
                default=defaults.max_new_tokens,
                show_default=True,
                help="The most tokens to generate for a row; fit is as many as the model's context leaves.",
            ),
            click.option(
                "--temperature",
                type=float,
                default=defaults.temperature,
                show_default=True,
                help="The sampling temperature; 0 is greedy decoding.",
            ),
            click.option(
                "--top-p",
                type=float,
                default=defaults.top_p,
                show_default=True,
                help="Sample from the likeliest tokens that together have this probability; 1 is all.",
            ),
            click.option(
                "--top-k",
                type=int,
                default=defaults.top_k,
                show_default=True,
                help="Sample from this many of the likeliest tokens; 0 is all.",
            ),
            click.option(
                "--seed",
                type=int,
                default=defaults.seed,
                show_default=True,
                help="The seed of sampling; a row is sampled by this seed and its id.",
            ),
            click.option(
                "--stop",
                multiple=True,
                metavar="TEXT",
                callback=stop_texts,
                help="End a text before this one; the option may be given several times. \\n is a line end, \\t a tab, "
                "\\\\ a backslash.",
            ),
            click.option(
                "--logprobs",
                is_flag=True,
                default=defaults.logprobs,
                help="Write the log-probability of every generated token.",
            ),
        )
    ):
        command = option(command)
    return command


_SHORT_FORMS = ("offload", "tp")  # flags that are `--set NAME=VALUE`: the engine says whether it knows them

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
        help="Set one of the engine's settings; a wrong name lists them all.",
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
        help="How many ranks share a model (ds-inference, paged); so many are started. Short for --set tp=N.",
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
        help="If no step ends for so many seconds, log where every rank stands, and end, to be started again; "
        "0 is never.",
    ),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What does the work: shared by `run` and `run-batch`."""

    @wraps(command)
    def spelled_out(*arguments: Any, settings: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SHORT_FORMS}
        short = [f"{name}={value}" for name, value in given.items() if value is not None]
        options["ranks"] = options["ranks"] or given["tp"] or 1
        return command(*arguments, settings=(*short, *settings), **options)

    decorated: Callable[..., Any] = spelled_out
    for option in reversed(_ENGINE_OPTIONS):
        decorated = option(decorated)
    return decorated
