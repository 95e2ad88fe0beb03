"""Files that a crash cannot tear: made whole under another name, or appended and synced.

No locks and no shared appends, so that it works on NFS and Lustre; a rename happens only inside one folder.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from batchgen.files import scratch_path, sync_folder
from batchgen.types import UserError


class CheckpointError(UserError):
    """The run folder cannot be used as asked: a sentence for the person at the terminal."""


class Damaged(CheckpointError):
    """A file of the run folder is not what was written."""


class DifferentRun(CheckpointError):
    """The run folder holds another run; the message names the fields that differ."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(folder: Path, error: OSError) -> CheckpointError:
    """`error`, met while a start was being prepared, as a sentence."""
    reason = error.strerror or str(error)
    remedy = "Make room, or choose another with -o" if error.errno in _NO_ROOM else "Choose another with -o"
    return CheckpointError(f"cannot write the run folder {folder}: {reason}. {remedy}")


def check_can_be_folder(path: Path) -> None:
    """Raises CheckpointError if `path`, or what should be a folder above it, is a file."""
    for folder in (path, *path.parents):
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise CheckpointError(f"{folder} is a file, not a folder. Choose another folder with -o")


def to_json(value: object) -> bytes:
    """`value` for a person to read, with a final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        CheckpointError: it is not there; Damaged: it is, and is no object.
    """
    try:
        value = json.loads(read_whole(path))
    except FileNotFoundError:
        what = "a bench folder" if path.name == "bench.json" else "a run folder"
        raise CheckpointError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error}). Restore it, or start a new run with another -o") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no object. Restore it, or start a new run with another -o")
    return value


def read_whole(path: Path) -> bytes:
    """What is in `path`, which another process may be replacing."""
    for _ in range(100):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS, of a file that another host has just replaced
                raise
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def make_exclusive(path: Path, data: bytes) -> bool:
    """Puts `data` at `path` if nothing is there yet; True if it did. Of several processes exactly one succeeds.

    A hard link of a finished file, since O_EXCL alone would show others a file still empty.
    """
    scratch = scratch_path(path)
    try:
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)
        except FileExistsError:
            # NFS, when the answer to the first request is lost: the second finds our own link.
            if scratch.stat().st_nlink == 1:
                return False
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def append(descriptor: int, data: bytes) -> None:
    """Appends all of `data` and waits until it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
