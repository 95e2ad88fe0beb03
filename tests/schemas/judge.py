"""Rows with schemas through an engine, and what `jsonschema` says of their texts."""

from __future__ import annotations

import datetime
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from batchgen import Host, RunSettings, run
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.schemas.draw import draw
from tests.schemas.written import REFUSED, WRITTEN

Schema = dict[str, Any]

MOST_TOKENS = 96
MOST_BY_CHANCE = 0.1
"""The share of rows without a constraint that may be valid all the same: a model may well give a JSON text."""

_SUBJECTS = ("a bakery", "a river", "a football match", "a film", "an old car", "a garden", "a trip by train")

_FORMATS = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid", "email"))


@_FORMATS.checks("date-time")
def _is_moment(value: object) -> bool:
    """RFC 3339 with a second of 60, which Python does not read."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt ](.*)", str(value), re.ASCII)
    return match is not None and _is_date(match[1]) and _is_time(match[2])


@_FORMATS.checks("time")
def _is_time(value: object) -> bool:
    found = re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", str(value))
    return found is not None and str(value).isascii()


@_FORMATS.checks("hostname")
def _is_host(value: object) -> bool:
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return re.fullmatch(rf"{label}(\.{label})*", str(value)) is not None and len(str(value)) < 254


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


@dataclass
class Outcome:
    """What became of the rows of one run, by their names."""

    valid: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    invalid: dict[str, str] = field(default_factory=dict)  # why, and the text
    failed: dict[str, str] = field(default_factory=dict)  # the row's sentence


def choose(count: int, seed: int = 0) -> dict[str, Schema]:
    """This many schemas by their names: all that are written by hand or a seventh of `count`, and drawn ones."""
    written = list(WRITTEN)
    if count < 7 * len(written):
        written = random.Random(seed).sample(written, count // 7)
    drawn = [draw(number) for number in range(seed, seed + count - len(written))]
    chosen = {name: WRITTEN[name] for name in written}
    return chosen | {f"{theme} {seed + place}": schema for place, (theme, schema) in enumerate(drawn)}


def generate(
    schemas: dict[str, Schema], model: Path, engine: str, folder: Path, is_constrained: bool = True
) -> Outcome:
    """Asks the model for a text by each schema, at temperature 1, and judges what it gives.

    Args:
        schemas: by the names of their rows.
        folder: for the run.
        is_constrained: False: the rows ask for the same in words alone.
    """
    rows = [_row(number, name, schema, is_constrained) for number, (name, schema) in enumerate(schemas.items())]
    settings = RunSettings(model=str(model), engine=engine, dtype="float32", batch_size=32, selftest=False)
    path = write_rows(folder / "in.jsonl", rows)
    run(str(path), folder / "out", settings, host=Host(ENVIRONMENT))
    outcome = Outcome()
    for row in read_rows(folder / "out" / "generations.jsonl"):
        _judge(row, schemas[row["id"]], outcome, is_constrained)
    return outcome


def unenforced(failed: dict[str, str]) -> list[str]:
    """Those of REFUSED that were not refused, or by a sentence that does not name what is wrong."""
    return [name for name in REFUSED if name not in failed.get(name, "")]


def problems(outcome: Outcome) -> Sequence[str]:
    """What is wrong with constrained rows, a sentence each."""
    said = [f"{name}: {why}" for name, why in outcome.invalid.items()]
    said += [f"{name} was refused: {why}" for name, why in outcome.failed.items() if name not in REFUSED]
    said += [f"{name} should have been refused by name" for name in unenforced(outcome.failed)]
    return said


def _row(number: int, name: str, schema: Schema, is_constrained: bool) -> dict[str, object]:
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    keys = f", with {', '.join(schema.get('properties', {}))}" if schema.get("properties") else ""
    row = {"id": name, "prompt": f"Some JSON about {subject}{keys}:\n", "max_new_tokens": MOST_TOKENS}
    return row | {"temperature": 1.0} | ({"json_schema": schema} if is_constrained else {})


def _judge(row: dict[str, Any], schema: Schema, outcome: Outcome, is_constrained: bool) -> None:
    name, text = row["id"], row["text"]
    if row["error"]:
        outcome.failed[name] = row["error"]["message"]
        return
    if not is_constrained:
        text = _find_json(text)
    elif row["finish_reason"] == "length":
        outcome.cut.append(name)
        return
    if why := find_fault(text, schema):
        outcome.invalid[name] = f"{why} in {text!r}"
    else:
        outcome.valid.append(name)


def _find_json(text: str) -> str:
    """The first object or list in a text, as people take it out of one; else the text as it stands."""
    start = re.search(r"[{\[]", text)
    if start is None:
        return text
    try:
        _, end = json.JSONDecoder().raw_decode(text, start.start())
    except ValueError:
        return text
    return text[start.start() : end]


def find_fault(text: str, schema: Schema) -> str:
    """Why the text is no JSON by the schema, in `jsonschema`'s words; "" if it is."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        return f"no JSON: {error}"
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    error = next(validator(schema, format_checker=_FORMATS).iter_errors(value), None)
    return "" if error is None else str(error.message)[:300]


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is none of JSON's numbers")
