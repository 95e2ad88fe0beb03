"""The command line. One file a command, imported only when it is called; file name = command name. A file that begins
with _ is no command, but shared by some."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from batchgen.redaction import redacted
from batchgen.types import ExitCode

if TYPE_CHECKING:
    from batchgen.checkpoint import Status
    from batchgen.runs.settings import Host, RunSettings


class CommandError(click.ClickException):
    """Could not run: a sentence for the person at the terminal."""

    exit_code = ExitCode.CANNOT_RUN

    def format_message(self) -> str:
        return redacted(self.message, os.environ)


class Unfinished(CommandError):
    """All is recorded, and the same command goes on from there."""

    exit_code = ExitCode.RESUMABLE


class _Commands(click.Group):
    """Finds commands by file name, so that `--help` and tab completion import none of them but the one asked for."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ImportError as error:
            from batchgen import packages

            sentence = packages.about(error)
            if sentence is None:
                raise
            raise CommandError(sentence) from error

    def list_commands(self, context: click.Context) -> list[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(context):
            return None
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SUMMARIES.get(name, "")) for name in self.list_commands(context)])


def asked_of(words: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The run folder and the options of `run …` or `run-batch …`, which are checked on the way.

    Raises:
        CommandError: the words are no command that makes a run.
        UsageError: an option is wrong.
    """
    if not words or words[0] not in ("run", "run-batch"):
        what = f"{words[0]} makes no run" if words else "there is no command behind --"
        raise CommandError(f"{what}: it must be -- run …, or -- run-batch …")
    module = importlib.import_module(f"{__name__}.{words[0].replace('-', '_')}")
    # With the settings of the real one: Click makes a command's -h once, and keeps it.
    context = module.command.make_context(words[0], list(words[1:]), **main.context_settings)
    folder: Path = module.folder_of(context.params)
    return folder, context.params


# What `--help` says of each command without importing it; a test compares these with the commands' own help.
_SUMMARIES = {
    "bench": "Measure engines on this machine, by the seed's table and by jobs of unequal lengths.",
    "cancel": "Cancel the Slurm jobs of a run; what is finished stays.",
    "job": "Carry a command out as the batch process of a Slurm job, requeued until it is done.",
    "merge": "Write the output files of a run folder again, or of an unfinished run.",
    "plan": "Say what fits, how large a batch and how long, before any weight is loaded.",
    "pull": "Prepare a model on a machine with internet; print its local path.",
    "report": "Write one page of HTML about a run: cost, speed, errors, texts.",
    "run": "Generate for every prompt of the input files, exactly once.",
    "run-batch": "Answer an OpenAI batch file, with the flags of `vllm run-batch`.",
    "split": "Write MODEL into the folder OUT, split over N ranks; print its path.",
    "status": "Say how far a run is, from its files and from Slurm's queue.",
    "submit": "Write the Slurm job of a run, and submit it; print its number.",
}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="batchgen", message="%(prog)s %(version)s")
def main() -> None:
    """Offline batch generation: every prompt of a file through a model, exactly once, whatever dies on the way."""
    # Slurm's warning kills a process that has no handler, and a run has one only when its modules are imported.
    # `batchgen job` sends it again.
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # Before torch looks at it. A cache that grows at every step leaves holes that nothing else fits into: without this,
    # 560 rows of BLOOM-7b1 were the most on a GPU that holds 1,240 of them (benchmarks/README.md).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def generation_config_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--generation-config`, with what a command does unless it is given."""
    return click.option(
        "--generation-config",
        metavar="auto|none|FOLDER",
        default=default,
        show_default=True,
        help="Sample as the model's author recommends, by generation_config.json, where neither row nor flag says how.",
    )


def fail(error: Exception) -> CommandError:
    """`error`, whose text is already a sentence, as what Click shows."""
    return CommandError(str(error))


@contextmanager
def results_only_on_stdout() -> Iterator[None]:
    """Whatever a library prints meanwhile, from C too, goes to stderr; DeepSpeed and others print to stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def log_to_stderr(rank: int, size: int) -> None:
    """Shows batchgen's messages, and others' warnings, with the rank where there are several."""
    import logging  # with its own imports half of what `--help` may cost

    class Redacted(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return redacted(super().format(record), os.environ)

    who = f"batchgen[{rank}]" if size > 1 else "batchgen"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacted(f"{who}: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("batchgen").setLevel(logging.INFO)
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text, count = record.getMessage(), len(said)
        said.add(text)
        return len(said) > count

    # What is damaged in the run folder is met by every rank, and by this process each time it looks.
    damage = logging.getLogger("batchgen.checkpoint.records")
    damage.addFilter(is_new)
    if rank > 0 or "BATCHGEN_STARTER" in os.environ:
        damage.setLevel(logging.ERROR)


def carry_out(inputs: Sequence[str], out: str | None, options: Mapping[str, Any]) -> tuple[Status, bool]:
    """`batchgen.run` for the command line: errors as sentences, progress on stderr, ranks by this same command.

    Gives the status, and whether this process speaks for the run (one rank of several does not).

    Args:
        options: of the command; those that belong to neither `RunSettings` nor `Host` are left alone.

    Raises:
        CommandError: it could not start.
        ImportError: a package is missing.
    """
    from batchgen import packages
    from batchgen.runs import flow, launcher
    from batchgen.types import UserError
    from batchgen.world import from_environment

    who = ""
    try:
        world = from_environment(os.environ)
        who = f"rank {world.rank}: " if world.size > 1 else ""
        if "BATCHGEN_STARTER" in os.environ:
            launcher.die_with(int(os.environ["BATCHGEN_STARTER"]))
        log_to_stderr(world.rank, world.size)
        # A run makes some objects a row, none of them in a cycle: looking for cycles at every 700th takes a sixth of
        # its time.
        gc.set_threshold(100_000, 50, 100)
        with results_only_on_stdout():
            return flow.run(inputs, out, settings_of(options), host=host_of(options)), world.size == 1
    except flow.MergeError as error:
        raise Unfinished(str(error)) from error
    except (UserError, ImportError) as error:
        sentence = packages.about(error) if isinstance(error, ImportError) else str(error)
        if sentence is None:
            _die(error, who)
        if launcher.tell_starter(redacted(sentence, os.environ), os.environ):
            sys.exit(CommandError.exit_code)
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
        click.echo(redacted(f"{who}{traceback.format_exc()}", os.environ), err=True, nl=False)
    first = str(error) if is_sentence else f"{type(error).__name__}: {error}".splitlines()[0][:300]
    why = first + "".join(f", with {note}" for note in getattr(error, "__notes__", ()))
    if not launcher.tell_starter(redacted(why, os.environ), os.environ):
        if is_sentence:
            _say(who + why)
        _say(f"{who}died. What is recorded is safe; the same command goes on from there")
    sys.exit(ExitCode.RESUMABLE)


def _say(sentence: str) -> None:
    try:
        click.echo(f"batchgen: {redacted(sentence, os.environ)}", err=True)
    except OSError:
        # The terminal or the pipe is gone. Click would exit with 1; the exit code shall still say how the run stands.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def about_failures(path: Path) -> str:
    """About the failed rows in `path`: the first of them, and what the same command would do about them all."""
    import json

    from batchgen.requests.output import failure_of, may_succeed

    said = f"what failed is in {path}"
    try:
        with path.open(encoding="utf-8") as file:
            rows = map(json.loads, file)
            first = next(rows)
            again = [may_succeed(first), *map(may_succeed, rows)]
    except (OSError, ValueError, StopIteration):
        return said
    message = str((failure_of(first) or {}).get("message") or "")[:300].rstrip(".")
    said += f", first: {message}" if message else ""
    if not any(again):
        return f"{said}. The input itself is wrong there: mend these rows, and give them a run of their own"
    if all(again):
        return f"{said}. The same command tries all of them again"
    return f"{said}. The same command tries {sum(again)} of them again; the input is wrong in the others"


def conclude(status: Status, speaks: bool) -> None:
    """Says how the run stands, and exits with its code."""
    from batchgen.types import CANNOT_WRITE, TOO_MANY_FAILED

    if not speaks:
        sys.exit(0)  # in order: another code would make srun kill the other ranks
    last = status.attempts[-1].ended if status.attempts else None
    counts = f"{status.good} of {status.rows} rows good, {status.failed} failed, {status.open} open"
    if status.open:
        why = last or "ended"
        again = "The same command goes on from there"
        if TOO_MANY_FAILED in why:
            again = "The same command with a higher --max-error-rate goes on from there"
        elif why.startswith(CANNOT_WRITE):
            again = "Nothing recorded is lost; make room, and the same command goes on from there"
        _say(f"{why}; {counts}. {again}")
    else:
        which = "" if status.shard.count == 1 else f"shard {status.shard} "
        _say(f"{which}finished; {counts}")
        if status.failed:
            _say(about_failures(status.folder / "errors.jsonl"))
    sys.exit(status.exit_code)
