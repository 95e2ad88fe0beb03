"""DeepSpeed's compiled operations, built once into a folder of batchgen's own, and loaded into this process.

torch compiles an extension at its first use, says nothing for minutes, and keeps other processes away with a file
called `lock`, for which they wait without end when the builder was killed (torch.utils.file_baton). Here all building
and loading happens under a lock of the operating system, which ends with the process that holds it: whoever has it may
remove any `lock`, for nobody else can be building in this folder.

DeepSpeed keeps what a process has loaded, and asks torch for it no more.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batchgen.engine import EngineError

Report = Callable[[str], None]
"""Takes one sentence about what is going on, for the person who waits."""

_OPERATIONS = ("pin_memory", "async_io")  # the second needs the first
_LINE_SECONDS = 10.0
_POLL = 0.2  # s
_LINES = 12  # of the compiler's, in the sentence


def prepare(cache: Path, report: Report) -> None:
    """Loads DeepSpeed's asynchronous file reads (`async_io`) into this process; builds them first if need be.

    A build takes one to three minutes and a C++ compiler. Called by every rank: one builds, the others wait.
    Sets TORCH_EXTENSIONS_DIR, and puts this environment's programs first on PATH: another ninja than the one that built
    it would build everything again.

    Args:
        cache: batchgen's cache folder.

    Raises:
        EngineError: libaio, the compiler or the folder is missing, or the build fails.
    """
    folder = cache / "extensions" / _make_key()
    scripts = sysconfig.get_path("scripts")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    with _lock_folder(folder, report):
        for operation in _OPERATIONS:
            (folder / operation / "lock").unlink(missing_ok=True)
        with _report_progress(f"building DeepSpeed's file reads in {folder}, once", report):
            _load()


def _load() -> None:
    builder = _make_builder()
    # Asked by `load` too, but only after it has built the first of the two operations, a minute later.
    if not builder.is_compatible(verbose=False):
        raise EngineError(
            "offload=nvme needs a C++ compiler and libaio with its headers, and a test program could not be built with "
            "them: apt-get install -y g++ libaio-dev (yum: gcc-c++ libaio-devel). If they are not where they usually "
            "are, CFLAGS and LDFLAGS say where"
        )
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        lines = _find_errors(str(error))
        raise EngineError(f"DeepSpeed's file reads (async_io) could not be built:\n{lines}") from error


def _make_builder() -> Any:
    # Not the one of deepspeed.ops.op_builder: where there is a GPU, that one links with the CUDA toolkit, which few
    # nodes have, though all that it does is to read files into host memory.
    from deepspeed.ops.op_builder.cpu.async_io import AsyncIOBuilder

    class PlainAsyncIO(AsyncIOBuilder):  # type: ignore[misc]
        """Compiled for every processor of this kind.

        It computes nothing. DeepSpeed would compile it for this node's very processor, and another node with the same
        home folder would die of an illegal instruction.
        """

        def cpu_arch(self) -> str:
            return ""

        def simd_width(self) -> str:
            return "-D__SCALAR__"

    return PlainAsyncIO()


def _find_errors(output: str) -> str:
    """The lines that say what went wrong: the compiler's first errors, or the last lines."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower() or "cannot find" in line]
    return "\n".join(errors[:_LINES] or lines[-_LINES:])


def _make_key() -> str:
    """Names all that a build depends on, the files of this environment and the C library among it."""
    versions = f"torch{torch.__version__}-deepspeed{importlib.metadata.version('deepspeed')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    machine = [sys.prefix, *platform.libc_ver(), platform.machine()]
    return f"{versions}-{python}-{hashlib.sha256(':'.join(machine).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


@contextmanager
def _lock_folder(folder: Path, report: Report) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".building").open("a")
    except OSError as error:
        raise EngineError(
            f"cannot write to {folder}: {error.strerror}. BATCHGEN_CACHE names another folder for batchgen's files"
        ) from error
    with stream:
        said = begin = time.monotonic()
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > _LINE_SECONDS:
                    said = time.monotonic()
                    report(f"waiting for another process that builds in {folder}, {said - begin:.0f} s so far")
                time.sleep(_POLL)
            except OSError as error:
                # Without a lock it is not known whether torch's is stale. Some cluster file systems have none.
                raise EngineError(
                    f"{folder} is on a file system without locks ({error.strerror}): set BATCHGEN_CACHE to a "
                    "folder on a local disk"
                ) from error
        yield


@contextmanager
def _report_progress(what: str, report: Report) -> Iterator[None]:
    """Says every 10 s that it is still going on."""
    ended = threading.Event()
    begin = time.monotonic()

    def say() -> None:
        while not ended.wait(_LINE_SECONDS):
            report(f"{what}: {time.monotonic() - begin:.0f} s so far")

    thread = threading.Thread(target=say, name="build", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
