"""What the commands that carry a run out have in common: how they start it, and how they say that it has ended."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from batchgen.commands import CommandError, Unfinished, log_to_stderr, results_only_on_stdout, sharing_warnings
from batchgen.redaction import redact
from batchgen.types import ExitCode

if TYPE_CHECKING:
    from batchgen.checkpoint import Status
    from batchgen.runs.settings import Host, RunSettings


def carry_out(inputs: Sequence[str], out: str | None, options: Mapping[str, Any]) -> tuple[Status, bool]:
    """`batchgen.run` for the command line: errors as sentences, progress on stderr, ranks by this same command.

    Gives the status, and whether this process reports the run's outcome (one rank of several does not).

    Args:
        options: of the command; those that belong to neither `RunSettings` nor `Host` are left alone.

    Raises:
        CommandError: it could not start.
        ImportError: a package is missing.
    """
    from batchgen import packages
    from batchgen.runs import flow, launcher
    from batchgen.runs.role import Role
    from batchgen.types import UserError
    from batchgen.world import from_environment

    who = ""
    try:
        role = Role(from_environment(os.environ), os.environ, options["ranks"])
        who = "" if role.is_single_process else f"rank {role.world.rank}: "
        if "BATCHGEN_STARTER" in os.environ:
            launcher.die_with(int(os.environ["BATCHGEN_STARTER"]))
        log_to_stderr(role.world.rank, role.world.size)
        # A run makes some objects a row, none of them in a cycle: looking for cycles at every 700th takes a sixth of
        # its time.
        gc.set_threshold(100_000, 50, 100)
        # As it ends, Python looks for cycles among all objects several times: a second, with those of torch.
        atexit.register(gc.freeze)
        with results_only_on_stdout(), sharing_warnings() if role.launches_ranks else nullcontext():
            return flow.run(inputs, out, settings_of(options), host=host_of(options)), role.is_single_process
    except flow.MergeError as error:
        raise Unfinished(str(error)) from error
    except (UserError, ImportError) as error:
        sentence = packages.explain_import_error(error) if isinstance(error, ImportError) else str(error)
        if sentence is None:
            _die(error, who)
        if launcher.tell_starter(redact(sentence, os.environ), os.environ):
            sys.exit(ExitCode.CANNOT_RUN)
        raise CommandError(who + sentence) from error
    except (Exception, KeyboardInterrupt) as error:
        _die(error, who)


def settings_of(options: Mapping[str, Any]) -> RunSettings:
    """What the options of `run` or `run-batch` say of the run itself.

    Raises:
        RunError: a value is out of its range.
    """
    from batchgen.runs.settings import RunSettings

    names = {field.name for field in fields(RunSettings)}
    values = {name: value for name, value in options.items() if name in names}
    return RunSettings(**values, engine_settings=options["settings"])


def host_of(options: Mapping[str, Any]) -> Host:
    """Where and how these options carry a run out; its ranks are started by this same command."""
    from batchgen.runs.progress import watch
    from batchgen.runs.settings import Host

    names = ("ranks", "shard", "heartbeat_seconds", "stall_seconds")
    return Host(os.environ, rank_command=sys.argv[1:], watch=watch, **{name: options[name] for name in names})


def _die(error: BaseException, who: str) -> NoReturn:
    """Says why this process dies, if only to the process that has started this rank, and exits."""
    from batchgen.engine import Died
    from batchgen.runs import launcher

    is_sentence = isinstance(error, Died)
    if not is_sentence and not isinstance(error, KeyboardInterrupt):
        click.echo(redact(f"{who}{traceback.format_exc()}", os.environ), err=True, nl=False)
    first = str(error) if is_sentence else f"{type(error).__name__}: {error}".splitlines()[0][:300]
    why = first + "".join(f", with {note}" for note in getattr(error, "__notes__", ()))
    if not launcher.tell_starter(redact(why, os.environ), os.environ):
        if is_sentence:
            _say(who + why)
        _say(f"{who}died. What is recorded is safe; the same command goes on from there")
    sys.exit(ExitCode.RESUMABLE)


def _say(sentence: str) -> None:
    try:
        click.echo(f"batchgen: {redact(sentence, os.environ)}", err=True)
    except OSError:
        # The terminal or the pipe is gone. Click would exit with 1; the exit code shall still say how the run stands.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def describe_failures(path: Path) -> str:
    """About the failed rows in `path`: the first of them, and what the same command would do about them all."""
    import json

    from batchgen.requests.output import failure_of, may_succeed

    sentence = f"what failed is in {path}"
    try:
        with path.open(encoding="utf-8") as file:
            rows = map(json.loads, file)
            first = next(rows)
            retried = [may_succeed(first), *map(may_succeed, rows)]
    except (OSError, ValueError, StopIteration):
        return sentence
    message = str((failure_of(first) or {}).get("message") or "")[:300].rstrip(".")
    sentence += f", first: {message}" if message else ""
    if not any(retried):
        return f"{sentence}. The input itself is wrong there: mend these rows, and give them a run of their own"
    if all(retried):
        return f"{sentence}. The same command tries all of them again"
    return f"{sentence}. The same command tries {sum(retried)} of them again; the input is wrong in the others"


def conclude(status: Status, reports_outcome: bool) -> None:
    """Says how the run stands, and exits with its code."""
    from batchgen.types import CANNOT_WRITE, TOO_MANY_FAILED

    if not reports_outcome:
        sys.exit(0)  # it has ended cleanly: another code would make srun kill the other ranks
    last = status.attempts[-1].ended if status.attempts else None
    counts = f"{status.good} of {status.rows} rows good, {status.failed} failed, {status.open} open"
    if status.open:
        why = last or "ended"
        advice = "The same command goes on from there"
        if TOO_MANY_FAILED in why:
            advice = "The same command with a higher --max-error-rate goes on from there"
        elif why.startswith(CANNOT_WRITE):
            advice = "Nothing recorded is lost; make room, and the same command goes on from there"
        _say(f"{why}; {counts}. {advice}")
    else:
        which = "" if status.shard.count == 1 else f"shard {status.shard} "
        _say(f"{which}finished; {counts}")
        if status.incomplete:
            rows = "1 row was" if status.incomplete == 1 else f"{status.incomplete} rows were"
            _say(
                f'{rows} cut before the text was all that its constraint demands (finish_reason "length"): in a run '
                "of their own, let them have more tokens (--max-new-tokens, unless the rows set a length themselves)"
            )
        if status.failed:
            _say(describe_failures(status.folder / "errors.jsonl"))
    sys.exit(status.exit_code)
