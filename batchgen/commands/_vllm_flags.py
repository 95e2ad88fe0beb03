"""The flags of `vllm run-batch`: which of them are ours, which change nothing in the answers, and which are refused.

`_vllm_flag_names` has their names. vLLM reads `_` for `-` in a name, and `--name.key value` for
`--name '{"key": value}'`. Flags of one dash and several letters are its own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from batchgen.commands import CommandError
from batchgen.commands._vllm_flag_names import IGNORED, INSTEAD, NEUTRAL, SHORT

MODULES = "--lora-modules"
"""vLLM's flag of adapters, whose value is not written as that of any flag of ours."""


@dataclass
class Foreign:
    """A flag that is not ours."""

    written: str  # on the command line, without a value
    name: str  # with - for _; without the key
    key: str  # of --name.key; "" without one
    values: list[str]


class RunBatch(click.Command):
    """Click reads our own flags, in any of vLLM's spellings; the others are judged."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.params if isinstance(option, click.Option)]
        words, foreign = _separate(args, options, ctx.help_option_names)
        words = [*_read_lora_modules(foreign), *_read_cache_dtype(foreign), *words]
        foreign = [flag for flag in foreign if flag.name != MODULES and not _is_cache_dtype(flag)]
        super().parse_args(ctx, words)
        if not ctx.resilient_parsing:
            names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
            ctx.args = _judge(foreign, ctx.params.get("model"), names | {MODULES})
        return ctx.args


def _separate(
    args: Sequence[str], options: Sequence[click.Option], helps: Sequence[str]
) -> tuple[list[str], list[Foreign]]:
    """The words for Click, and the other flags with the words behind each."""
    valued = {name for option in options if not option.is_flag for name in option.opts}
    plain = {name for option in options if option.is_flag for name in (*option.opts, *option.secondary_opts)} | set(
        helps
    )
    own: list[str] = []
    foreign: list[Foreign] = []
    values = own  # where a word goes that is no flag
    is_value = False
    for place, word in enumerate(args):
        if word == "--" and not is_value:
            own += args[place:]
            break
        if is_value or not re.match(r"-[^\d.]", word):
            (own if is_value else values).append(word)
            is_value = False
            continue
        name, key, value = _read(word)
        values = own
        if (name in valued or name in plain) and not key:
            own.append(name if value is None else f"{name}={value}")
            is_value = name in valued and value is None
        elif word[:2] in valued:
            own.append(word)
        else:
            foreign.append(Foreign(word.partition("=")[0], name, key, [] if value is None else [value]))
            values = foreign[-1].values
    objects = {name for option in options if option.metavar == "JSON" for name in option.opts}
    return [*_joined([option for option in foreign if option.name in objects]), *own], [
        option for option in foreign if option.name not in objects
    ]


def _read_lora_modules(flags: Sequence[Foreign]) -> list[str]:
    """vLLM's `--lora-modules NAME=FOLDER …`, or `{"name": …, "path": …}`, as our `--adapter`.

    Raises:
        CommandError: one cannot be read.
    """
    modules = [text for flag in flags if flag.name == MODULES for text in flag.values]
    found = []
    for text in modules:
        try:
            value = (
                json.loads(text)
                if text.startswith("{")
                else dict(zip(("name", "path"), text.split("=", 1), strict=True))
            )
            found += ["--adapter", f"{value['name']}={value['path']}"]
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f'{MODULES} {text}: must be NAME=FOLDER, or {{"name": …, "path": …}}') from error
    return found


def _is_cache_dtype(flag: Foreign) -> bool:
    """Whether this is vLLM's name of a `--kv-dtype` of ours, besides auto."""
    return flag.name == "--kv-cache-dtype" and not flag.key and flag.values in (["fp8"], ["fp8_e4m3"])


def _read_cache_dtype(flags: Sequence[Foreign]) -> list[str]:
    return [word for flag in flags if _is_cache_dtype(flag) for word in ("--kv-dtype", "fp8")]


def _joined(flags: Sequence[Foreign]) -> list[str]:
    """`--name.key value` of one name as `--name '{"key": value}'`."""
    objects: dict[str, dict[str, Any]] = {}
    for flag in flags:
        inner = objects.setdefault(flag.name, {})
        *outer, last = flag.key.split(".")
        for key in outer:
            inner = inner.setdefault(key, {})
        text = " ".join(flag.values)
        try:
            inner[last] = json.loads(text)
        except ValueError:  # a text needs no quotes
            inner[last] = text
    return [word for name, value in objects.items() for word in (name, json.dumps(value))]


def _read(word: str) -> tuple[str, str, str | None]:
    """Name, key and value of --name.key=value."""
    flag, equals, value = word.partition("=")
    name, _, key = flag.partition(".")
    if name.startswith("--"):
        return name.replace("_", "-"), key, value if equals else None
    if name.startswith("-O") and name != "-O":
        return "-O", key, name[2:]  # -O3
    return name, key, value if equals else None


def _judge(flags: Sequence[Foreign], model: str | None, own: Collection[str]) -> list[str]:
    """The names of those flags that change nothing in the answers.

    Raises:
        CommandError: one of them would, or nobody here knows it; what to do instead.
    """
    for flag in flags:
        name = SHORT.get(flag.name, flag.name)
        positive = f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name
        is_off = positive != name and positive in INSTEAD
        is_ignored = name in IGNORED or (positive in IGNORED and name not in INSTEAD)
        if is_ignored or is_off or _is_neutral(name, flag, model):
            continue
        if name in INSTEAD:
            raise CommandError(f"run-batch has no {flag.written}, which would change the answers: {INSTEAD[name]}")
        raise CommandError(f"run-batch has no {flag.written}{_meant(flag.name, own)}")
    return [flag.written for flag in flags]


def _is_neutral(name: str, flag: Foreign, model: str | None) -> bool:
    if name in _JUDGES:
        return _JUDGES[name](flag)
    if flag.key or name not in INSTEAD:
        return False
    value = " ".join(flag.values)
    return value.lower() in NEUTRAL.get(name, ()) or (name == "--tokenizer" and value in (model, "None"))


# Of --structured-outputs-config: what says how a constraint is enforced, and not what it is.
_HOW = frozenset({"backend", "disable_fallback", "reasoning_parser", "reasoning_parser_plugin"})


def _says_only_how(flag: Foreign) -> bool:
    return all(key in _HOW or not value for key, value in _values(flag).items())


def _names_a_backend_alone(flag: Foreign) -> bool:
    """vLLM 0.8 took `xgrammar:no-fallback,disable-any-whitespace`."""
    return set("".join(flag.values).partition(":")[2].split(",")) <= {"", "no-fallback", "disable-fallback"}


# Of --reasoning-config: the texts that it takes for the start and the end of the thinking, in any version.
_STARTS = ("reasoning_start_str", "think_start_str")
_ENDS = ("reasoning_end_str", "think_end_str")


def _has_marks_of_models(flag: Foreign) -> bool:
    """Whether a thinking that is over its budget would end as it does here: by the mark of the model alone."""
    from batchgen.requests.thinking import MARKS

    starts, ends = {marks.start for marks in MARKS}, {marks.end for marks in MARKS}
    return all(
        not value
        or key == "reasoning_parser"
        or (key in _STARTS and value in starts)
        or (key in _ENDS and value in ends)
        for key, value in _values(flag).items()
    )


def _values(flag: Foreign) -> dict[str, Any]:
    """What a flag that takes an object says, with _ in its keys; a text that is no object stands behind "?"."""
    text = " ".join(flag.values)
    if flag.key:
        return {flag.key.replace("-", "_"): "" if text.lower() in ("false", "none", "null") else text}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"?": True}


_JUDGES: Mapping[str, Callable[[Foreign], bool]] = {
    "--structured-outputs-config": _says_only_how,
    "--reasoning-config": _has_marks_of_models,
    "--guided-decoding-backend": _names_a_backend_alone,
}
"""Flags some of whose values change nothing, besides those of `NEUTRAL`; whether a value is one of them."""


def _meant(name: str, own: Collection[str]) -> str:
    from batchgen.commands.run import command

    if name in {option for parameter in command.params for option in parameter.opts if option.startswith("--")}:
        return "; `batchgen run` has"
    near = difflib.get_close_matches(name, own, 1, 0.9) or difflib.get_close_matches(name, [*INSTEAD, *IGNORED], 1, 0.9)
    if near:
        return f"; is {near[0]} meant?"
    return ", and it is no flag of vLLM's that is known here: it may change the answers. Leave it out"
