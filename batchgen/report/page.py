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
from batchgen.report.words import counted, duration, machine_time, moment, percent, plural, rate

_HERE = Path(__file__).parent
_ATTEMPTS = 500  # that the page lists


@dataclass(frozen=True)
class Found:
    """What was found in a run folder."""

    status: Status
    known: Mapping[str, Any]  # run.json
    starts: Sequence[Start]
    clock: Clock
    speed: Speed
    rows: Rows
    characters: int  # of a text that the page keeps
    texts: bool  # whether it has the rows
    jobs: Sequence[str]  # a sentence for each job that has ended by itself


def render(found: Found, plots: Sequence[Plot]) -> str:
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
        head=_head(found),
        tiles=list(_tiles(found)),
        went=_went(found.starts, found.clock),
        plots=[plot for plot in plots if plot.name != "errors"],
        errors=next((plot for plot in plots if plot.name == "errors"), None),
        kinds=found.rows.kinds,
        attempts=_attempts(found),
        table=_table(found),
        settings=list(_settings(found)),
    )


def _head(found: Found) -> dict[str, object]:
    status, asked = found.status, found.known["asked"]
    first = found.known.get("first_start", {})  # it speaks for attempts whose claims are damaged
    engines = ", ".join(dict.fromkeys(one.engine for one in found.starts if one.engine)) or first.get("engine")
    model = next((one.model for one in reversed(found.starts) if one.model), first.get("model"))
    dtype = f"dtype {asked['dtype']}" if asked.get("dtype") else ""
    named = [model or asked.get("model"), dtype, f"engine {engines or 'not chosen yet'}", *_sampling(asked)]
    when = "No attempt has begun."
    if found.starts:
        begin, end = min(one.begin for one in found.starts), max(one.end for one in found.starts)
        now = "and it works" if status.state == "running" else f"to {moment(end)}"
        when = f"From {moment(begin)} {now}: {duration(end - begin)}, {plural(len(found.starts), 'attempt')}."
    return {
        "name": status.folder.resolve().name,
        "state": status.state,
        "lead": ", ".join(str(name) for name in named if name not in (None, "", "none")),
        "when": when,
        "foot": f"Written by batchgen report on {moment(time.time())} ({time.strftime('%Z')}) from "
        f"{status.folder.resolve()}. This page loads nothing from a network.",
    }


def _sampling(asked: Mapping[str, Any]) -> Iterator[str]:
    params = {name.partition(".")[2]: value for name, value in asked.items() if name.startswith("sampling.")}
    if "temperature" in params:
        yield f"temperature {params['temperature']:g}" if params["temperature"] else "greedy"
    if "max_new_tokens" in params:
        most = params["max_new_tokens"]
        yield "new tokens as far as the context goes" if most == "fit" else f"at most {most} new tokens"


def _tile(label: str, value: str, note: str, parts: Sequence[tuple[str, float]] = ()) -> dict[str, object]:
    return {
        "label": label,
        "value": value,
        "note": note,
        "parts": [{"colour": colour, "share": share} for colour, share in parts if share],
    }


def _tiles(found: Found) -> Iterator[dict[str, object]]:
    status, starts = found.status, found.starts
    parts = (("teal", status.good), ("red", status.failed), ("line", status.open))
    note = f"{counted(status.good)} good, {counted(status.failed)} failed, {counted(status.open)} open"
    done = status.good + status.failed
    yield _tile("rows finished", percent(done, status.rows) if status.open else counted(status.rows), note, parts)
    reads = f"from {counted(status.prompt_tokens)} of prompts, in {plural(status.batches, 'batch', 'batches')}"
    yield _tile("tokens generated", counted(status.generated_tokens), reads)
    if not starts:
        return
    span = max(one.end for one in starts) - min(one.begin for one in starts)
    overall = status.generated_tokens / span if span > 0 else 0.0
    rates = f"peak {rate(found.speed.peak)}; {rate(overall)} over all, pauses and loading included"
    yield _tile("tokens a second", rate(found.speed.median), f"median while it worked; {rates}")
    unseen = unseen_gpu_seconds(starts)
    gpus, ranks = unseen + sum(one.gpu_seconds for one in starts), sum(one.rank_seconds for one in starts)
    name, one, spent = ("GPU time", "GPU", gpus) if gpus else ("time of all ranks", "rank", ranks)
    each = f"{status.generated_tokens / spent * 3600:,.0f} tokens a {one} hour" if spent else ""
    kinds = ", ".join(dict.fromkeys(kind for one in starts for kind in one.devices))
    assumed = f"{machine_time(unseen)} of it by ranks that had not loaded, counted like others" if unseen else ""
    yield _tile(name, machine_time(spent), "; ".join(filter(None, [each, kinds or "no GPU is recorded", assumed])))
    lost = sum(one.lost_tokens for one in starts)
    waited = sum(seconds for _, _, seconds in found.clock.pauses)
    again = "no generated token was lost"
    if lost:
        again = f"{counted(lost)} tokens were generated and never recorded"
    elif not all(one.orderly for one in starts):
        again = "no lost token is known of; what died was counted up to its last heartbeat"
    yield _tile("between attempts", duration(waited) if waited else "none", again)


def _went(starts: Sequence[Start], clock: Clock) -> dict[str, object] | None:
    """What the ranks' time went into."""
    whole = sum(one.rank_seconds for one in starts)
    if not whole:
        return None
    loading, idle = sum(one.loading for one in starts), sum(one.idle for one in starts)
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
    lost = [one for one in starts if one.lost_tokens]
    if lost:
        tokens = sum(one.lost_tokens for one in lost)
        share = percent(tokens, tokens + sum(one.generated_tokens for one in starts))
        which = ", ".join(str(one.number) for one in lost[:10]) + (" and more" if len(lost) > 10 else "")
        noun = "attempt" if len(lost) == 1 else "attempts"
        sentences.append(
            f"{counted(tokens)} tokens, {share} of all, were generated and never recorded, in {noun} {which}: those in "
            "flight at its end, and those that an engine has put back and computed again."
        )
    label = "; ".join(f"{part['name']}: {part['value']}" for part in parts)
    title = f"Where the {machine_time(whole)} of all ranks went"
    return {"title": title, "parts": parts, "sentences": sentences, "label": label}


def _attempts(found: Found) -> dict[str, object]:
    """The table of attempts; columns that would say nothing are left out."""
    starts = found.starts
    recorded = any(one.devices for one in starts)  # else a column of GPUs would say nothing
    columns: dict[str, Callable[[Start], object]] = {
        "attempt": lambda one: one.number,
        "shard": lambda one: one.shard,
        "began": lambda one: moment(one.begin),
        "took": lambda one: duration(one.seconds),
        "how it ended": lambda one: one.outcome,
        "rows": lambda one: counted(one.rows),
        "failed": lambda one: counted(one.failed),
        "tokens": lambda one: counted(one.generated_tokens),
        "lost": lambda one: counted(one.lost_tokens),
        "engine": lambda one: one.engine,
        "batch": lambda one: one.batch_size or ("by memory" if one.engine else ""),
        "ranks": lambda one: one.ranks,
        "GPUs": lambda one: (
            ", ".join(f"{count} x {kind.removeprefix('NVIDIA ')}" for kind, count in one.devices.items())
            or ("not recorded" if recorded and one.unseen else "")
        ),
        "host": lambda one: (
            ", ".join(one.hosts[:2]) + (f" and {len(one.hosts) - 2} more" if len(one.hosts) > 2 else "")
        ),
        "job": lambda one: one.job,
    }
    idle = {"shard": {"0/1"}, "GPUs": {""}, "job": {""}}
    names = [name for name, cell in columns.items() if {cell(one) for one in starts} - idle.get(name, set())]
    notes = list(found.jobs)
    unread = sorted({one.number for one in found.status.attempts} - {one.number for one in starts})
    if unread:
        which = ", ".join(map(str, unread[:10])) + (" and more" if len(unread) > 10 else "")
        notes.insert(0, f"Not listed, since no file tells when it was: attempt {which}.")
    if len(starts) > _ATTEMPTS:
        notes.insert(0, f"{len(starts) - _ATTEMPTS:,} earlier attempts are not listed.")
    return {
        "names": names,
        "numbers": ("attempt", "took", "rows", "failed", "tokens", "lost", "ranks"),
        "lines": [[columns[name](one) for name in names] for one in starts[-_ATTEMPTS:]],
        "notes": notes,
    }


def _table(found: Found) -> dict[str, object]:
    rows, status = found.rows, found.status
    notes = []
    shown = len(rows.shown)
    if not found.texts:
        return {"notes": ["This page was asked to leave the rows out."], "index": "", "chunks": []}
    if not shown:
        return {"notes": ["No row is finished yet."], "index": "", "chunks": []}
    failed = sum(rows.failed)
    if shown < status.good + status.failed:
        which = "all failed rows" if failed == status.failed else f"a uniform sample of {counted(failed)} failed rows"
        notes.append(
            f"{counted(shown)} of {counted(status.good + status.failed)} finished rows are here: {which} and a uniform "
            f"sample of {counted(shown - failed)} good ones. Searches find these alone; --rows sets how many."
        )
    ends = endings(rows)
    if ends["length"]:
        share = percent(ends["length"], shown - failed)
        notes.append(f"{share} of the good rows here were cut at their limit of new tokens (length).")
    if rows.cut:
        notes.append(
            f"Of {plural(rows.cut, 'row')} a text is cut after {counted(found.characters)} characters; "
            "--text-characters sets the length. Searches do not find what is cut."
        )
    if rows.without_prompt == shown:
        notes.append("The run folder does not hold the prompts of these rows: they are in the input.")
    return {"notes": notes, "index": rows.index(), "chunks": rows.chunks}


def _settings(found: Found) -> Iterator[tuple[str, str]]:
    known = found.known
    first = known.get("first_start", {})
    yield "run folder", str(found.status.folder.resolve())
    for name in ("model_folder", "input_files", "engine_reason"):
        value = first.get(name)
        if value and value != ".":
            yield name.replace("_", " "), "\n".join(value) if isinstance(value, list) else str(value)
    for name, value in known["asked"].items():
        if value not in (None, "", {}, []):
            yield name.replace("sampling.", "").replace("_", " "), str(value)
    commands = Counter(" ".join(one.command) for one in found.starts if one.command)
    if commands:
        yield "command", "\n".join(commands)
    yield "versions", ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    for name in ("python", "platform"):
        if first.get(name):
            yield name, str(first[name])
