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

from batchgen.redaction import redact


class CommandError(click.ClickException):
    """Could not run: a sentence for the person at the terminal."""

    def __init__(self, message: str) -> None:
        from batchgen.types import ExitCode  # a sixth of what `--help` costs

        super().__init__(message)
        self.exit_code = ExitCode.CANNOT_RUN  # type: ignore[misc]  # of each error, where Click has one for all

    def format_message(self) -> str:
        return redact(self.message, os.environ)


class Unfinished(CommandError):
    """All is recorded, and the same command goes on from there."""

    def __init__(self, message: str) -> None:
        from batchgen.types import ExitCode

        super().__init__(message)
        self.exit_code = ExitCode.RESUMABLE  # type: ignore[misc]  # of each error, where Click has one for all


class _Commands(click.Group):
    """Finds commands by file name, so that `--help` and tab completion import none of them but the one asked for."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ImportError as error:
            from batchgen import packages

            sentence = packages.explain_import_error(error)
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
    "bench": "Measure engines on this machine, by an article's table and by workloads of unequal lengths.",
    "cancel": "Cancel the Slurm jobs of a run; what is finished stays.",
    "job": "Carry a command out as the batch process of a Slurm job, requeued until it is done.",
    "merge": "Write the output files of a run folder again, or of an unfinished run.",
    "plan": "Say what fits, how large a batch and how long, before any weight is loaded.",
    "pull": "Prepare a model on a machine with internet; print its local path.",
    "quantise": "Write MODEL into the folder OUT, its weights rounded to 8 or 4 bits; print its path.",
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
    from batchgen.commands._print import let_nothing_fail_to_print

    let_nothing_fail_to_print()
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
            return redact(super().format(record), os.environ)

    who = f"batchgen[{rank}]" if size > 1 else "batchgen"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacted(f"{who}: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("batchgen").setLevel(logging.INFO)
    # What is damaged in the run folder is met by every rank, and by this process each time it looks.
    damage = logging.getLogger("batchgen.checkpoint.records")
    damage.addFilter(_LoggedOnce())
    if rank > 0 or "BATCHGEN_STARTER" in os.environ:
        damage.setLevel(logging.ERROR)
    # What is wrong with a column is met by every rank, too, but a rare column by one of them alone.
    columns = logging.getLogger("batchgen.requests.prompts")
    columns.addFilter(_WarningsOfColumns())
    if rank > 0 and _WARNED not in os.environ:  # torchrun or srun has started it
        columns.setLevel(logging.ERROR)


_WARNED = "BATCHGEN_WARNED"  # a folder where the processes of one start mark which warnings have been logged


@contextmanager
def sharing_warnings() -> Iterator[None]:
    """The processes that are started inside log a warning about a column once, all together with this one."""
    import tempfile

    try:
        folder = tempfile.TemporaryDirectory(prefix="batchgen-warned-", ignore_cleanup_errors=True)
    except OSError:  # no room: each process warns by itself
        yield
        return
    with folder as name:
        os.environ[_WARNED] = name
        try:
            yield
        finally:
            del os.environ[_WARNED]


class _LoggedOnce:
    """Lets a message pass that this process has not logged yet."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def filter(self, record: Any) -> bool:
        """Whether `record` is new."""
        about = self._identify(record)
        is_new = about not in self._logged
        self._logged.add(about)
        return is_new

    def _identify(self, record: Any) -> str:
        """What two records have in common that say the same."""
        return str(record.getMessage())


class _WarningsOfColumns(_LoggedOnce):
    """Lets a warning pass that no process of this start has logged; where the row stands makes no difference."""

    def _identify(self, record: Any) -> str:
        return repr((record.msg, record.args[1:]))  # the first argument is the place of a row

    def filter(self, record: Any) -> bool:
        """Whether `record` is new to all processes of this start."""
        if not super().filter(record):
            return False
        about = self._identify(record)
        if _WARNED in os.environ:
            import hashlib

            try:
                mark = hashlib.sha256(about.encode("utf-8", "backslashreplace")).hexdigest()
                (Path(os.environ[_WARNED]) / mark).touch(exist_ok=False)
            except FileExistsError:
                return False
            except OSError:
                pass  # better twice than never
        return True
