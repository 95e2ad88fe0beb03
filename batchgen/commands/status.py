"""`batchgen status`: how far a run is, from its files alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchgen.commands import fail

if TYPE_CHECKING:
    from batchgen.checkpoint import Status


@click.command("status")
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="For programs: every figure.")
@click.option("--exit-code", is_flag=True, help="Exit as `run` would: 0 good, 3 some rows failed, 75 rows are open.")
def command(run: str, as_json: bool, exit_code: bool) -> None:
    """Say from its files alone how far a run is.

    Safe at any time and from any host: it only reads.
    """
    from batchgen.checkpoint import CheckpointError, RunFolder, status

    try:
        found = status(RunFolder(Path(run)))
    except (CheckpointError, OSError) as error:
        raise fail(error) from error
    if as_json:
        values = {**dataclasses.asdict(found), "folder": str(found.folder), "exit_code": found.exit_code}
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo(_text(found))
    sys.exit(found.exit_code if exit_code else 0)


def _text(found: Status) -> str:
    from batchgen.progress import duration

    lines = [
        f"{found.folder}: {found.state}",
        f"  rows    {found.good} good, {found.failed} failed, {found.open} open, of {found.rows}",
        f"  tokens  {found.generated_tokens:,} generated from {found.prompt_tokens:,} in {found.batches} batches",
    ]
    if found.tokens_per_second:
        lines.append(f"  speed   {found.tokens_per_second:,.0f} tokens/s in the last attempt")
    if found.eta_seconds is not None:
        lines.append(f"  left    about {duration(found.eta_seconds)}")
    for attempt in found.attempts:
        state = attempt.ended or ("works" if attempt.live else "died")
        lost = f", {attempt.lost_tokens:,} tokens lost" if attempt.lost_tokens and not attempt.live else ""
        lines.append(f"  {attempt.where}, {attempt.ranks} rank(s): {state}{lost}")
    return "\n".join(lines)
