"""Whether an offload fits here, asked before a weight is loaded: each refusal names figure, limit and remedy."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import tempfile
from pathlib import Path

from batchgen import device
from batchgen.engine import EngineError
from batchgen.engines.ds_zero.offload import Offload

_SHARE = 0.9  # of free memory or disk; the rest is for the process itself and its batches
_CAP_IPC_LOCK = 14  # linux/capability.h: whoever has it may lock any amount of memory


def check_folder(folder: Path) -> None:
    """Checks that `folder` can hold swap files: it is there, can be written to, and takes O_DIRECT, which DeepSpeed
    opens its files with.

    Raises:
        EngineError: it is not, with the reason.
    """
    if not folder.is_dir():
        raise EngineError(f"offload=nvme={folder}: there is no such folder here. Create it, or mount the disk it is on")
    try:
        with tempfile.NamedTemporaryFile(prefix=".batchgen-", dir=folder) as file:
            direct = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                with mmap.mmap(-1, mmap.PAGESIZE) as page:  # O_DIRECT wants memory at the beginning of a page
                    os.write(direct, page)
            finally:
                os.close(direct)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise EngineError(
                f"offload=nvme={folder}: its file system, one in memory perhaps, cannot read past the page cache "
                "(O_DIRECT); name a folder on a local disk"
            ) from error
        raise EngineError(f"offload=nvme={folder}: cannot write there: {error.strerror}") from error


def check_space(offload: Offload, folder: Path, local_ranks: int) -> None:
    """Checks that the swap files of this host's ranks fit below `folder`, once what an earlier attempt left is gone.

    Raises:
        EngineError: they do not.
    """
    needed, free = offload.file_bytes * local_ranks, shutil.disk_usage(folder).free
    if needed > free * _SHARE:
        raise EngineError(
            f"offload=nvme={folder}: the weights of this host's {local_ranks} ranks take {_gb(needed)} there, and "
            f"{_gb(free)} are free. Make room, name another folder, or spread the model over more hosts"
        )


def check_host_memory(offload: Offload, local_ranks: int) -> None:
    """Checks that what this host's ranks keep in its memory fits into what is available, or into the job's cgroup.

    Raises:
        EngineError: it does not.
    """
    needed, free = offload.host_bytes * local_ranks, device.host_free_bytes()
    if needed > free * _SHARE:
        remedy = (
            "offload=nvme=FOLDER with a folder on a local disk"
            if offload.aio is None
            else "fewer buffers, or more ranks"
        )
        raise EngineError(
            f"offloading takes {_gb(needed)} of this host's memory for its {local_ranks} ranks, and {_gb(free)} are "
            f"available. Ask for more memory (sbatch --mem), or use {remedy}"
        )


def check_locked_memory(offload: Offload) -> None:
    """Checks that this process may lock its buffers, and raises its own soft limit to the hard one for that.

    DeepSpeed locks them with mlock, which RLIMIT_MEMLOCK (`ulimit -l`) limits for each process, and aborts the process
    where that fails. What torch pins for copies to a GPU is not counted there.

    Raises:
        EngineError: it may not.
    """
    limit = read_lockable_bytes()
    if limit is None or offload.locked_bytes <= limit:
        if limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        return
    raise EngineError(
        f"offload=nvme needs {_gb(offload.locked_bytes)} of locked memory in each rank for its buffers, and the limit "
        f"(ulimit -l) is {_gb(limit)}. Have it raised (in Slurm: PropagateResourceLimitsExcept=MEMLOCK), or use more "
        "ranks, whose buffers are smaller"
    )


def read_lockable_bytes() -> int | None:
    """Returns the bytes that this process may lock: its hard limit; None: any amount."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    if int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1:
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if hard == resource.RLIM_INFINITY else hard


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
