"""Tiles of the page: one figure each, with a word on it. Those of constraints, samples, tools and thinking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from batchgen.checkpoint import Status
from batchgen.report.rows import Rows
from batchgen.report.words import counted, percent, plural


def tile(label: str, value: str, note: str, parts: Sequence[tuple[str, float]] = ()) -> dict[str, object]:
    """A tile as the template takes it.

    Args:
        parts: colours of `page.css` and shares of a bar; one with none of it shows no bar.
    """
    return {
        "label": label,
        "value": value,
        "note": note,
        "parts": [{"colour": colour, "share": share} for colour, share in parts if share],
    }


def tiles_of_parameters(status: Status, rows: Rows, identity: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Tiles of what some runs alone have: constraints, samples, calls of tools, thinking.

    Args:
        identity: what was asked of the run, of `run.json`.
    """
    refused = sum(kind.count for kind in rows.kinds if kind.type == "constraint")
    if status.incomplete or refused or identity.get("sampling.constraint"):
        cut = f"{plural(status.incomplete, 'row')} cut by the length before the constraint was met"
        yield tile("constraints not met", counted(status.incomplete + refused), f"{cut}, {counted(refused)} refused")
    where = _where(rows)
    if rows.with_samples:
        yield tile("samples", counted(rows.samples), f"texts of {plural(rows.with_samples, 'row')}{where}")
    if rows.calls:
        yield tile("calls of tools", counted(rows.calls), f"in {plural(rows.with_calls, 'row')}{where}")
    if status.reasoning_tokens:
        share = percent(status.reasoning_tokens, status.generated_tokens)
        yield tile("tokens of thinking", counted(status.reasoning_tokens), f"{share} of the tokens generated")


def _where(rows: Rows) -> str:
    """Of how many rows that is said, unless it is all of them."""
    read = len(rows.failed) - sum(rows.failed)
    return f" of the {counted(read)} good rows that were read" if read < rows.good else ""
