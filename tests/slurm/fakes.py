"""Slurm's commands as scripts of a few words, for what a Slurm of its own would take long to come to."""

from __future__ import annotations

from pathlib import Path

import pytest

# As the commands of Slurm 22.05 say it.
NO_CONTROLLER = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
NO_SUCH_JOB = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
NO_ACCOUNTING = 'echo "Slurm accounting storage is disabled" >&2; exit 1'


def have(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> Path:
    """Leaves these on PATH, each with its text in sh, and no other command; the folder that they are in."""
    place = folder / "commands"
    place.mkdir()
    for name, text in commands.items():
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    return place
