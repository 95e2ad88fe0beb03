"""What every job of a site needs: `~/.config/batchgen/slurm.toml`, or slurm.toml in the working folder.

For example:

    account = "abc"
    partition = "gpu"
    modules = ["cuda/12.4"]                           # module load …
    setup = ["export HF_HOME=/scratch/me/hf"]         # lines of bash, before anything starts
    srun = ["--cpu-bind=none"]                        # options of srun
    sbatch = { constraint = "a100", exclusive = true }
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.slurm.directives import Directive, merged, usable
from batchgen.slurm.queue import SlurmError

_LISTS = ("modules", "setup", "srun")


@dataclass(frozen=True)
class Site:
    """A site's defaults; what is typed comes before them."""

    directives: Sequence[Directive] = ()
    modules: Sequence[str] = ()
    setup: Sequence[str] = ()
    srun: Sequence[str] = ()


def load(environment: Mapping[str, str], working: Path) -> Site:
    """The defaults of the user, each replaced by the working folder's where that names it too.

    Raises:
        SlurmError: a file is no TOML, has a name that means nothing, or an option that a run cannot have.
    """
    config = Path(environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "/")) / ".config")
    paths = (config / "batchgen" / "slurm.toml", working / "slurm.toml")
    directives: list[Directive] = []
    lists: dict[str, Sequence[str]] = {}
    for path in paths:
        defaults = _read(path)
        lists |= {name: [str(line) for line in defaults[name]] for name in _LISTS if name in defaults}
        options: dict[str, Any] = {name: defaults[name] for name in ("account", "partition") if name in defaults}
        options |= defaults.get("sbatch", {})
        left_out = [name for name, value in options.items() if value is False]
        given = [
            Directive(name, None if value is True else str(value))
            for name, value in options.items()
            if name not in left_out
        ]
        try:
            directives = merged(
                (directive for directive in directives if directive.name not in left_out), map(usable, given)
            )
        except SlurmError as error:
            raise SlurmError(f"{path}: {error}") from error
    return Site(directives, **lists)


def _read(path: Path) -> dict[str, Any]:
    try:
        defaults = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SlurmError(f"cannot read {path}: {error}") from error
    for name, value in defaults.items():
        if name in _LISTS and isinstance(value, list) and all(isinstance(line, str) for line in value):
            continue
        if name in ("account", "partition") and isinstance(value, str):
            continue
        if name == "sbatch" and isinstance(value, dict):
            continue
        raise SlurmError(
            f"{path}: {name} is not understood. It may set account and partition (texts), modules, setup and srun "
            "(lists of texts), and sbatch (a table of other options)"
        )
    return defaults
