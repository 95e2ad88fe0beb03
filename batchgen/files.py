"""Files that take another's place: a reader sees the old one or the new one, never a part.

No locks, so that it works on NFS and Lustre; a rename happens only inside one folder.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives the path of a file to be made, which takes the place of `path` when the block ends without an exception.

    Args:
        durable: sync the file and its folder, so that it outlives a power cut.

    Raises:
        OSError: it cannot be written; the error names a file.
    """
    scratch = scratch_path(path)
    try:
        yield scratch
        if durable:
            _sync(scratch)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Puts `data` at `path`; see `replacing`."""
    with replacing(path, durable=durable) as scratch, open(scratch, "xb") as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` outlive a power cut, where its file system can do that."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # said of folders by FUSE, SMB and others
            raise


def scratch_path(path: Path) -> Path:
    """A name beside `path` that no other process takes. Files of that form are swept when a run goes on."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
