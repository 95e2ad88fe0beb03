"""The folder of a run's swap files. DeepSpeed never removes them, and gives those of all jobs the same names."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from pathlib import Path

from batchgen.engine import EngineError

logger = logging.getLogger(__name__)

_PATIENCE = 30.0  # s that ranks of an attempt which was just killed get to be gone
_POLL = 0.2  # s


class SwapFolder:
    """FOLDER/batchgen-<16 hex of the run>: one rank's view of it.

    A rank holds a lock on a file of its own there for as long as it lives; the kernel lets go of it when the process
    ends, however it ends. On a file system without locks only the run folder's claim keeps two attempts of a run apart.

    Order: local rank 0 of each host calls `clean`; a barrier of all ranks; each rank calls `open`, and DeepSpeed
    writes below `path`; after the last step each rank calls `close`.

    Args:
        folder: what the user named; it must exist.
        run: what tells this run from all others that may use `folder`, on other hosts too, and is the same in all its
            attempts.
        rank: of the whole world.
    """

    def __init__(self, folder: Path, run: str, rank: int) -> None:
        digest = hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.path = folder.absolute() / f"batchgen-{digest}"
        self._rank = rank
        self._lock: int | None = None

    def clean(self, patience: float = _PATIENCE) -> None:
        """Removes what a crashed attempt of this run has left, with the host that it ran on being another one or not.

        Raises:
            EngineError: a process of an earlier attempt is still using it after `patience` seconds, or it cannot be
                removed.
        """
        until = time.monotonic() + patience
        while self._in_use():
            if time.monotonic() > until:
                raise EngineError(
                    f"{self.path} is in use by a process of an earlier attempt of this run; end that process first"
                )
            time.sleep(_POLL)
        try:
            while self.path.exists():
                _remove(self.path)
        except OSError as error:
            raise EngineError(
                f"{self.path}, left by an earlier attempt of this run, cannot be removed: {error.strerror}"
            ) from error

    def open(self) -> None:
        """Makes the folder, and locks this rank's part of it.

        Raises:
            EngineError: it cannot be made, or another process has this rank's part.
        """
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EngineError(f"cannot make swap files in {self.path}: {error.strerror}") from error
        if not _try_lock(lock):
            os.close(lock)
            raise EngineError(f"rank {self._rank}'s part of {self.path} is in use by another process")
        self._lock = lock

    def close(self) -> None:
        """Removes this rank's files, and the folder with the last rank's. Nothing is read from them any more."""
        if self._lock is None:
            return
        # DeepSpeed's names: zero_stage_3/<type>params/rank<N>
        try:
            for files in self.path.glob(f"zero_stage_3/*/rank{self._rank}"):
                shutil.rmtree(files)
            self._lock_file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("swap files stay in %s: %s. Remove them yourself", self.path, error.strerror)
        os.close(self._lock)
        self._lock = None
        for folder in (*self.path.glob("zero_stage_3/*"), self.path / "zero_stage_3", self.path):
            try:
                folder.rmdir()
            except OSError:
                continue  # another rank's files are still there, or it was quicker

    @property
    def _lock_file(self) -> Path:
        return self.path / f"rank{self._rank}.lock"

    def _in_use(self) -> bool:
        for file in self.path.glob("rank*.lock"):
            try:
                lock = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if not _try_lock(lock):
                    return True
            finally:
                os.close(lock)
        return False


def _try_lock(file: int) -> bool:
    """False: another process has it. A file system without locks lets everybody have it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove(folder: Path) -> None:
    """Removes `folder`, or as much of it as another host, which cleans it too, has left."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
