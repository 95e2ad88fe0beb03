"""A small disk of its own for a run folder: one that can be full, or read-only."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 4 << 20
_BALLAST = ".ballast"


def can_mount(scratch: Path) -> bool:
    """Whether this process may mount a file system at a folder."""
    with mounted(scratch / "mount-test") as mountable:
        return mountable


@contextmanager
def mounted(place: Path) -> Iterator[bool]:
    """`place` as a disk of `SIZE` bytes; False where mounting is not allowed, and then it is an ordinary folder."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "batchgen-chaos", str(place)]
    is_mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    """Leaves no byte on the disk."""
    with open(place / _BALLAST, "ab", buffering=0) as ballast:
        for size in (1 << 16, 512, 1):
            try:
                while ballast.write(bytes(size)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def empty(place: Path) -> None:
    """Makes room again."""
    ballast = place / _BALLAST
    if ballast.exists():  # and the disk may be read-only
        ballast.unlink()


@contextmanager
def read_only(place: Path, is_mounted: bool) -> Iterator[bool]:
    """Nothing below `place` can be written meanwhile; False where that cannot be had: for root without a mount."""
    if is_mounted:
        deadline = time.monotonic() + 30.0
        # A killed process has no environment any more, by which it was found, a moment before its files are closed.
        while subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True).returncode != 0:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "cannot be made read-only", str(place))
            time.sleep(0.05)
        try:
            yield True
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    elif os.getuid() == 0:
        yield False
    else:
        folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        try:
            yield True
        finally:
            for folder in folders:
                folder.chmod(0o755)
