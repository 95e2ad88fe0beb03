"""The command line. One file a command, imported only when it is called; file name = command name. A file that begins
with _ is no command, but shared by some."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from batchgen.redaction import redacted
from batchgen.types import ExitCode


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


def parse_run_command(words: Sequence[str]) -> tuple[Path, dict[str, Any]]:
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
    "bench": "Measure engines on this machine, by an article's table and by jobs of unequal lengths.",
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
        help="Sample as the model's author recommends in generation_config.json, where neither the row nor an option "
        "says how.",
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
    logged: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text, count = record.getMessage(), len(logged)
        logged.add(text)
        return len(logged) > count

    # What is damaged in the run folder is met by every rank, and by this process each time it looks.
    damage = logging.getLogger("batchgen.checkpoint.records")
    damage.addFilter(is_new)
    if rank > 0 or "BATCHGEN_STARTER" in os.environ:
        damage.setLevel(logging.ERROR)
