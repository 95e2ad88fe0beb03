"""The page: what its template is told, and the whole of it as text."""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from batchgen.checkpoint import Status
from batchgen.report.batches import Clock, Speed
from batchgen.report.drawing import Plot
from batchgen.report.history import Start, unseen_gpu_seconds
from batchgen.report.rows import Rows, endings
from batchgen.report.tiles import tile, tiles_of_parameters
from batchgen.report.words import counted, duration, machine_time, moment, percent, plural, rate

_HERE = Path(__file__).parent
_ATTEMPTS = 500  # that the page lists


@dataclass(frozen=True)
class Report:
    """What was found in a run folder."""

    status: Status
    manifest: Mapping[str, Any]  # run.json
    starts: Sequence[Start]
    clock: Clock
    speed: Speed
    rows: Rows
    characters: int  # of a text that the page keeps
    texts: bool  # whether it has the rows
    jobs: Sequence[str]  # a sentence for each job that has ended by itself


def render(report: Report, plots: Sequence[Plot]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=digest,
        head=_head(report),
        tiles=list(_tiles(report)),
        went=_went(report.starts, report.clock),
        plots=[plot for plot in plots if plot.name != "errors"],
        errors=next((plot for plot in plots if plot.name == "errors"), None),
        kinds=report.rows.kinds,
        attempts=_attempts(report),
        table=_table(report),
        settings=list(_settings(report)),
    )


def _head(report: Report) -> dict[str, object]:
    status, identity = report.status, report.manifest["asked"]
    first = report.manifest.get("first_start", {})  # it speaks for attempts whose claims are damaged
    engines = ", ".join(dict.fromkeys(start.engine for start in report.starts if start.engine)) or first.get("engine")
    model = next((start.model for start in reversed(report.starts) if start.model), first.get("model"))
    dtype = f"dtype {identity['dtype']}" if identity.get("dtype") else ""
    named = [model or identity.get("model"), dtype, f"engine {engines or 'not chosen yet'}", *_sampling(identity)]
    when = "No attempt has begun."
    if report.starts:
        begin, end = min(start.begin for start in report.starts), max(start.end for start in report.starts)
        now = "and it works" if status.state == "running" else f"to {moment(end)}"
        when = f"From {moment(begin)} {now}: {duration(end - begin)}, {plural(len(report.starts), 'attempt')}."
    return {
        "name": status.folder.resolve().name,
        "state": status.state,
        "lead": ", ".join(str(name) for name in named if name not in (None, "", "none")),
        "when": when,
        "foot": f"Written by batchgen report on {moment(time.time())} ({time.strftime('%Z')}) from "
        f"{status.folder.resolve()}. This page loads nothing from a network.",
    }


def _sampling(identity: Mapping[str, Any]) -> Iterator[str]:
    params = {name.partition(".")[2]: value for name, value in identity.items() if name.startswith("sampling.")}
    if "temperature" in params:
        yield f"temperature {params['temperature']:g}" if params["temperature"] else "greedy"
    if "max_new_tokens" in params:
        limit = params["max_new_tokens"]
        yield "new tokens as far as the context goes" if limit == "fit" else f"at most {limit} new tokens"


def _tiles(report: Report) -> Iterator[dict[str, object]]:
    status, starts = report.status, report.starts
    parts = (("teal", status.good), ("red", status.failed), ("line", status.open))
    note = f"{counted(status.good)} good, {counted(status.failed)} failed, {counted(status.open)} open"
    done = status.good + status.failed
    yield tile("rows finished", percent(done, status.rows) if status.open else counted(status.rows), note, parts)
    reads = f"from {counted(status.prompt_tokens)} of prompts, in {plural(status.batches, 'batch', 'batches')}"
    yield tile("tokens generated", counted(status.generated_tokens), reads)
    yield from tiles_of_parameters(status, report.rows, report.manifest["asked"])
    if not starts:
        return
    span = max(start.end for start in starts) - min(start.begin for start in starts)
    overall = status.generated_tokens / span if span > 0 else 0.0
    rates = f"peak {rate(report.speed.peak)}; {rate(overall)} over all, pauses and loading included"
    yield tile("tokens a second", rate(report.speed.median), f"median while it worked; {rates}")
    unseen = unseen_gpu_seconds(starts)
    gpus, ranks = unseen + sum(start.gpu_seconds for start in starts), sum(start.rank_seconds for start in starts)
    name, unit, spent = ("GPU time", "GPU", gpus) if gpus else ("time of all ranks", "rank", ranks)
    each = f"{status.generated_tokens / spent * 3600:,.0f} tokens a {unit} hour" if spent else ""
    kinds = ", ".join(dict.fromkeys(kind for start in starts for kind in start.devices))
    assumed = f"{machine_time(unseen)} of it by ranks that had not loaded, counted like others" if unseen else ""
    yield tile(name, machine_time(spent), "; ".join(filter(None, [each, kinds or "no GPU is recorded", assumed])))
    lost = sum(start.lost_tokens for start in starts)
    waited = sum(seconds for _, _, seconds in report.clock.pauses)
    loss = "no generated token was lost"
    if lost:
        loss = f"{counted(lost)} tokens were generated and never recorded"
    elif not all(start.orderly for start in starts):
        loss = "no lost token is known of; what died was counted up to its last heartbeat"
    yield tile("between attempts", duration(waited) if waited else "none", loss)


def _went(starts: Sequence[Start], clock: Clock) -> dict[str, object] | None:
    """What the ranks' time went into."""
    whole = sum(start.rank_seconds for start in starts)
    if not whole:
        return None
    loading, idle = sum(start.loading for start in starts), sum(start.idle for start in starts)
    generating = max(whole - loading - idle, 0.0)
    parts = [
        {
            "name": name,
            "colour": colour,
            "share": 100 * seconds / whole,  # parts that grow by less than 1 together would not fill their bar
            "value": f"{percent(seconds, whole)}, {machine_time(seconds)}",
        }
        for name, colour, seconds in (
            ("batches that are recorded", "teal", generating),
            ("starting and loading", "blue", loading),
            ("behind a rank's last recorded batch", "orange", idle),
        )
    ]
    sentences = [
        "Behind the last recorded batch lies what a kill has lost, the wait for slower ranks, and the merge at the end."
    ]
    pauses = clock.pauses
    if pauses:
        longest = max(seconds for _, _, seconds in pauses)
        sentences.append(
            f"Between attempts nothing worked for {duration(sum(seconds for _, _, seconds in pauses))}, in "
            f"{plural(len(pauses), 'pause')}; the longest took {duration(longest)}."
        )
    lost = [start for start in starts if start.lost_tokens]
    if lost:
        tokens = sum(start.lost_tokens for start in lost)
        share = percent(tokens, tokens + sum(start.generated_tokens for start in starts))
        which = ", ".join(str(start.number) for start in lost[:10]) + (" and more" if len(lost) > 10 else "")
        noun = "attempt" if len(lost) == 1 else "attempts"
        sentences.append(
            f"{counted(tokens)} tokens, {share} of all, were generated and never recorded, in {noun} {which}: those in "
            "flight at its end, and those that an engine has put back and computed again."
        )
    label = "; ".join(f"{part['name']}: {part['value']}" for part in parts)
    title = f"Where the {machine_time(whole)} of all ranks went"
    return {"title": title, "parts": parts, "sentences": sentences, "label": label}


def _attempts(report: Report) -> dict[str, object]:
    """The table of attempts; columns that would say nothing are left out."""
    starts = report.starts
    recorded = any(start.devices for start in starts)  # else a column of GPUs would say nothing
    columns: dict[str, Callable[[Start], object]] = {
        "attempt": lambda start: start.number,
        "shard": lambda start: start.shard,
        "began": lambda start: moment(start.begin),
        "took": lambda start: duration(start.seconds),
        "how it ended": lambda start: start.outcome,
        "rows": lambda start: counted(start.rows),
        "failed": lambda start: counted(start.failed),
        "tokens": lambda start: counted(start.generated_tokens),
        "lost": lambda start: counted(start.lost_tokens),
        "engine": lambda start: start.engine,
        "batch": lambda start: start.batch_size or ("by memory" if start.engine else ""),
        "ranks": lambda start: start.ranks,
        "GPUs": lambda start: (
            ", ".join(f"{count} x {kind.removeprefix('NVIDIA ')}" for kind, count in start.devices.items())
            or ("not recorded" if recorded and start.unseen else "")
        ),
        "host": lambda start: (
            ", ".join(start.hosts[:2]) + (f" and {len(start.hosts) - 2} more" if len(start.hosts) > 2 else "")
        ),
        "job": lambda start: start.job,
    }
    idle = {"shard": {"0/1"}, "GPUs": {""}, "job": {""}}
    names = [name for name, cell in columns.items() if {cell(start) for start in starts} - idle.get(name, set())]
    notes = list(report.jobs)
    unread = sorted({attempt.number for attempt in report.status.attempts} - {start.number for start in starts})
    if unread:
        which = ", ".join(map(str, unread[:10])) + (" and more" if len(unread) > 10 else "")
        notes.insert(0, f"Not listed, since no file tells when it was: attempt {which}.")
    if len(starts) > _ATTEMPTS:
        notes.insert(0, f"{len(starts) - _ATTEMPTS:,} earlier attempts are not listed.")
    return {
        "names": names,
        "numbers": ("attempt", "took", "rows", "failed", "tokens", "lost", "ranks"),
        "lines": [[columns[name](start) for name in names] for start in starts[-_ATTEMPTS:]],
        "notes": notes,
    }


def _table(report: Report) -> dict[str, object]:
    rows, status = report.rows, report.status
    notes = []
    in_table = len(rows.row_numbers)
    if not report.texts:
        return {"notes": ["This page was asked to leave the rows out."], "index": "", "chunks": []}
    if not in_table:
        return {"notes": ["No row is finished yet."], "index": "", "chunks": []}
    failed = sum(rows.failed)
    if in_table < status.good + status.failed:
        which = "all failed rows" if failed == status.failed else f"a uniform sample of {counted(failed)} failed rows"
        notes.append(
            f"{counted(in_table)} of {counted(status.good + status.failed)} finished rows are here: {which} and a "
            f"uniform sample of {counted(in_table - failed)} good ones. Searches find these alone; "
            "--rows sets how many."
        )
    ends = endings(rows)
    if ends["length"]:
        share = percent(ends["length"], in_table - failed)
        notes.append(f"{share} of the good rows here were cut at their limit of new tokens (length).")
    if rows.cut:
        notes.append(
            f"Of {plural(rows.cut, 'row')} a text is cut after {counted(report.characters)} characters; "
            "--text-characters sets the length. Searches do not find what is cut."
        )
    if rows.without_prompt == in_table:
        notes.append("The run folder does not hold the prompts of these rows: they are in the input.")
    return {"notes": notes, "index": rows.index(), "chunks": rows.chunks}


def _settings(report: Report) -> Iterator[tuple[str, str]]:
    manifest = report.manifest
    first = manifest.get("first_start", {})
    yield "run folder", str(report.status.folder.resolve())
    for name in ("model_folder", "input_files", "engine_reason"):
        value = first.get(name)
        if value and value != ".":
            yield name.replace("_", " "), "\n".join(value) if isinstance(value, list) else str(value)
    for name, value in manifest["asked"].items():
        if value not in (None, "", {}, []):
            yield name.replace("sampling.", "").replace("_", " "), str(value)
    commands = Counter(" ".join(start.command) for start in report.starts if start.command)
    if commands:
        yield "command", "\n".join(commands)
    yield "versions", ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    for name in ("python", "platform"):
        if first.get(name):
            yield name, str(first[name])
