"""Whether a run is as it shall be: read from its files alone, by nothing that the run itself reads them with."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.rows import Rows


class Fault(AssertionError):
    """What is wrong: `kind` is lost, doubled, hung, torn, order, text, errors, timing or exit."""

    def __init__(self, kind: str, sentence: str, rows: int = 0) -> None:
        super().__init__(f"{kind}: {sentence}")
        self.kind = kind
        self.rows = rows  # that are lost or doubled


@dataclass(frozen=True)
class Proof:
    """A whole line of a batches file, and the text that it speaks of."""

    batches: str
    line: dict[str, Any]
    text: bytes | None  # None: not there, or not what was written

    @property
    def rows(self) -> list[int]:
        """Those that are finished by it."""
        return [] if self.text is None else list(self.line["rows"])


def proofs(out: Path, contents: dict[str, bytes] | None = None) -> Iterator[Proof]:
    """All whole records of the run folder `out`; of what `contents` holds of its batches files, if given."""
    if contents is None:
        contents = {path.name: path.read_bytes() for path in sorted(out.glob("batches-*.jsonl"))}
    for name, content in sorted(contents.items()):
        text = out / name.replace("batches", "generations")
        held = text.read_bytes() if text.exists() else b""
        for line in content.split(b"\n")[:-1]:
            sealed = re.fullmatch(rb'(\{.*),"seal":(\d+)\}', line)
            if sealed and zlib.crc32(sealed[1]) == int(sealed[2]):
                record = json.loads(line)
                part = held[record["begin"] : record["end"]]
                whole = len(part) == record["end"] - record["begin"] and zlib.crc32(part) == record["checksum"]
                yield Proof(name, record, part if whole else None)


def finished(out: Path) -> set[int]:
    """The rows whose record and text are whole."""
    return {row for proof in proofs(out) for row in proof.rows}


def check_kept(before: set[int], out: Path, what: str) -> None:
    """Raises Fault unless all rows that were finished `before` still are, after `what`."""
    if lost := sorted(before - finished(out)):
        raise Fault("lost", f"rows {lost} were finished before {what} and are not any more", len(lost))


def check_survived(acknowledged: dict[str, bytes], harmed: set[str], out: Path) -> None:
    """Raises Fault unless what a run had said to be finished before a power cut is.

    Args:
        acknowledged: what was synced of the batches files.
        harmed: files that something else than the cut has damaged.
    """
    for proof in [*proofs(out, acknowledged), *proofs(out)]:
        if proof.text is None and not harmed & {proof.batches, proof.batches.replace("batches", "generations")}:
            rows, name = proof.line["rows"], proof.batches
            what = f"after a power cut {name} has a record of rows {rows}, whose text is not there"
            raise Fault("lost", what, len(rows))
    said = {row for proof in proofs(out, acknowledged) for row in proof.rows}
    check_kept(said, out, "a power cut")


def check(out: Path, unbroken: Path, rows: Rows, most_in_flight: dict[int, int] | None = None) -> None:
    """Raises Fault unless the run in `out` has every row of `rows` exactly once, with the text of `unbroken`.

    Args:
        most_in_flight: by attempt, the most tokens that its batches could hold, where its heartbeats are unharmed.
    """
    mine, theirs = lines(out / "generations.jsonl"), lines(unbroken / "generations.jsonl")
    for where, indexes in (
        ("generations.jsonl", [row.get("index") for row in mine]),
        ("the records", [row for proof in proofs(out) for row in proof.rows]),
    ):
        times = Counter(indexes)
        if lost := [row for row in range(rows.count) if not times[row]]:
            raise Fault("lost", f"rows {lost} are not in {where}", len(lost))
        if doubled := [row for row in times if times[row] > 1]:
            raise Fault("doubled", f"rows {doubled} are more than once in {where}", len(doubled))
    if [row["index"] for row in mine] != list(range(rows.count)):
        raise Fault("order", "generations.jsonl is not in the order of the input")
    check_errors(out, mine, rows)
    for own, other in zip(mine, theirs, strict=True):
        if own != other or (own["text"] is None) != (own["index"] in rows.errors):
            raise Fault("text", f"row {own['index']} is {own}, in the unbroken run {other}")
        if own["index"] in rows.stops and own["finish_reason"] != "stop":
            raise Fault("text", f"row {own['index']} did not end at its stop text: {own}")
    check_proofs(out, mine)
    check_timing(out, mine, most_in_flight or {})


def check_proofs(out: Path, mine: list[dict[str, Any]]) -> None:
    """Raises Fault unless each record's text is the lines of its rows, and they are what was merged."""
    for proof in proofs(out):
        if proof.text is None:
            continue
        said = [json.loads(line) for line in proof.text.split(b"\n")[:-1]]
        if [row["index"] for row in said] != proof.rows or said != [mine[row] for row in proof.rows]:
            raise Fault("text", f"{proof.batches} has rows {proof.rows}, whose text differs from generations.jsonl")


def check_errors(out: Path, mine: list[dict[str, Any]], rows: Rows) -> None:
    """Raises Fault unless exactly the bad rows have errors, and errors.jsonl holds them."""
    errors = {row["index"]: (row["error"]["line"], row["error"]["type"]) for row in mine if row["error"]}
    if errors != rows.errors:
        raise Fault("errors", f"the error rows are {errors}, not {rows.errors}")
    if lines(out / "errors.jsonl") != [row for row in mine if row["error"]]:
        raise Fault("errors", "errors.jsonl does not hold the error rows of generations.jsonl")


def check_timing(out: Path, mine: list[dict[str, Any]], most_in_flight: dict[int, int]) -> None:
    """Raises Fault unless timing.jsonl counts every row and token once, and no attempt lost more than its batches."""
    timing = lines(out / "timing.jsonl")
    prompts, tokens = (sum(batch[name] for batch in timing) for name in ("prompts", "generated_tokens"))
    full = sum(row["generated_tokens"] for row in mine)
    if (prompts, tokens) != (len(mine), full):
        raise Fault("timing", f"timing.jsonl counts {prompts} rows and {tokens} tokens, not {len(mine)} and {full}")
    for attempt, most in most_in_flight.items():
        beats = [json.loads(path.read_bytes()) for path in out.glob(f"attempts/{attempt:05d}-*.json")]
        committed = sum(batch["generated_tokens"] for batch in timing if batch["attempt"] == attempt)
        generated = sum(beat["generated_tokens"] for beat in beats)
        if generated - committed > most:
            raise Fault("timing", f"attempt {attempt} lost {generated - committed} tokens; {most} were in flight")


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects in `path`, an output file: the last line ends with a newline, like all others."""
    content = path.read_bytes()
    try:
        found = [json.loads(line) for line in content.split(b"\n")[:-1]]
    except ValueError as error:
        raise Fault("torn", f"{path} has a line that is none: {error}") from error
    if content and not content.endswith(b"\n"):
        raise Fault("torn", f"the last line of {path} is cut")
    return found
