"""Files of every format, damaged at random, through the whole flow with the engine that echoes.

Every seed makes a file and a way to run it. No exception but a sentence for the person at the terminal may come out,
and what finishes has every row once, in order, as good JSON, with an error that names file and line where it failed.
"""

from __future__ import annotations

import gzip
import json
import re
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import RunSettings
from batchgen.requests.output import ErrorFormat
from batchgen.requests.recipe import Recipe
from batchgen.runs.flow import Host, MergeError, OutputFormat, run
from batchgen.types import SamplingParams, UserError
from tests import mutations
from tests.commands.starts import ENVIRONMENT

_TEMPLATES = ("Q: {{ prompt }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ topic * max_new_tokens }}")

Outcome = Literal["good", "rows failed", "no table", "refused"]


def case(seed: int, folder: Path) -> Outcome:
    """Makes the file of `seed` in `folder`, runs it, and checks all that must hold.

    Raises:
        AssertionError, or whatever has escaped from the run.
    """
    random = Random(seed)
    name = random.choice(list(mutations.FORMATS))
    rows = mutations.rows(random, random.randint(0, 30))
    whole = mutations.FORMATS[name](rows)
    content = mutations.mutate(random, whole) if random.random() < 0.8 else whole
    path = mutations.write(folder, name, content)
    options: dict[str, Any] = {
        "recipe": Recipe(
            prompt_column=random.choice([None, None, None, "topic"]),
            sampling=SamplingParams(max_new_tokens=random.choice([1, 8, 128]), logprobs=random.random() < 0.2),
            model=random.choice([None, None, None, "m"]),
        ),
        "output_format": random.choice(["jsonl", *get_args(OutputFormat)]),
        "error_format": random.choice(get_args(ErrorFormat)),
        "batch_size": random.choice([None, 1, 5]),
    }
    if random.random() < 0.2:
        options["recipe"] = Recipe(template=random.choice(_TEMPLATES))
    outcome = _run(path, folder / "out", options)
    if content == whole:
        assert (outcome == "refused") == (not rows), outcome
    if outcome in ("refused", "no table"):
        return outcome
    first = _output(folder / "out", options)
    assert len(first) == _rows_of(name, content, len(rows) if content == whole else len(first))
    if seed % 4 == 0:
        assert _run(path, folder / "again", options) == outcome
        assert _output(folder / "again", options) == first, "a second run is another one"
    if seed % 4 == 1:
        assert _run(path, folder / "out", options) == outcome
        assert _output(folder / "out", options) == first, "a second start has changed the output"
    return outcome


def _run(path: Path, out: Path, options: dict[str, Any]) -> Outcome:
    refused: UserError | None = None
    try:
        status = run(str(path), out, RunSettings(engine="echo", **options), host=Host(ENVIRONMENT))
    except UserError as error:
        refused = error
    if isinstance(refused, MergeError):  # not every type of Arrow has a place in every table
        assert f"write them as JSON lines: batchgen merge --output-format jsonl {out}" in str(refused), refused
        assert not (out / f"generations.{options['output_format']}").exists()
        return "no table"
    if refused is not None:
        assert path.name in str(refused), f"does not name the file: {refused}"
        assert not list(out.glob("generations*"))
        return "refused"
    assert (status.open, status.good + status.failed) == (0, status.rows), status
    assert status.exit_code == (3 if status.failed else 0), status
    errors = [_parsed(line) for line in (out / "errors.jsonl").read_bytes().splitlines()]
    assert len(errors) == status.failed
    for row in errors:
        _check_named(row, path.name)
    return "rows failed" if status.failed else "good"


def _check_named(row: dict[str, Any], name: str) -> None:
    """The sentence of a failed row names file and line, wherever it stands."""
    text = json.dumps(row, ensure_ascii=False)
    if "index" not in row and ("Request must not" in text or "Supported endpoints" in text):
        return  # vLLM's own words
    assert re.search(rf"(line|row) \d+ of {re.escape(name)}", text), f"names no line: {text[:500]}"
    if "index" in row:
        assert f" {row['error']['line']} of {name}" in row["error"]["message"], row["error"]


def _output(out: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The merged rows, each once and in order."""
    kind = options["output_format"]
    path = out / f"generations.{kind}"
    if kind == "jsonl":
        content = path.read_bytes()
        assert not content or content.endswith(b"\n")
        rows = [_parsed(line) for line in content.split(b"\n")[:-1]]
    else:
        table = pq.read_table(path) if kind == "parquet" else pa.ipc.open_file(str(path)).read_all()
        table.validate(full=True)
        # OpenAI's answers are JSON text in a table; `created` is when the run began.
        rows = [
            {name: re.sub(r'"created": \d+', "", repr(value)) for name, value in row.items()}
            for row in _without_zones(table).to_pylist()
        ]
    # Where plain rows and answers are mixed, these have none.
    numbers = [int(row["index"]) for row in rows if row.get("index", "None") != "None"]
    assert numbers == sorted(set(numbers)), numbers
    if len(numbers) == len(rows):
        assert numbers == list(range(len(rows)))
        ids = [row["id"] for row in rows if row["error"] in (None, "None")]
        assert len(set(ids)) == len(ids), "two rows of one id"
    for row in rows:
        with suppress(KeyError, TypeError):
            del row["response"]["body"]["created"]  # when the run began
    return rows


def _without_zones(table: pa.Table) -> pa.Table:
    """With text for times, which Python cannot hold in every time zone that a damaged file can name."""
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(number, field.name, table.column(number).cast(pa.int64()))
    return table


def _parsed(line: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(line, parse_constant=_refuse)
    return found


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _rows_of(name: str, content: bytes, otherwise: int) -> int:
    """Rows that the file must have, as far as a few lines can say."""
    if name == "b.jsonl.gz":
        content = gzip.decompress(content)
    elif name != "a.jsonl":
        return otherwise
    return sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
