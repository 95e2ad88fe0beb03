"""DeepSpeed's compiled operations: built once, for one process at a time, and a killed build holds nobody up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchgen.engine import EngineError
from batchgen.engines.ds_zero import extensions
from batchgen.models import cache_folder

_HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""

_PREPARE = """
import sys
from pathlib import Path
from batchgen.engines.ds_zero import extensions
extensions.prepare(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr))
from deepspeed.ops.op_builder import AsyncIOBuilder
assert AsyncIOBuilder().load(verbose=False).__file__.startswith(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `prepare` sets is undone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv("PATH", os.environ["PATH"])


def test_without_libaio_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDFLAGS", "-Wl,--no-such-flag")  # no program links, as without the library
    with pytest.raises(EngineError, match=r"apt-get install -y g\+\+ libaio-dev"):
        extensions.prepare(tmp_path, print)


def test_a_build_that_fails_says_what_the_compiler_said(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase \"$*\" in *--version*|*-dumpversion*) exec g++ \"$@\";; esac\n"
                        "echo 'x.cpp:1: error: no such thing' >&2; exit 1\n")  # fmt: skip
    compiler.chmod(0o755)
    # In a process of its own: DeepSpeed keeps what one has loaded, and builds it no more.
    code = (
        "import sys; from pathlib import Path; from batchgen.engines.ds_zero import extensions; "
        "extensions.prepare(Path(sys.argv[1]), print)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "EngineError" in done.stderr
    assert re.search(r"could not be built:\n.*x\.cpp:1: error: no such thing", done.stderr, re.DOTALL), done.stderr


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot write to .*BATCHGEN_CACHE names another folder"):
        extensions.prepare(tmp_path / "file", print)


def test_one_process_builds_and_another_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_LINE_SECONDS", 0.0)
    (tmp_path / ".building").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / ".building")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    said: list[str] = []
    waiting, entered = threading.Event(), threading.Event()

    def report(line: str) -> None:
        said.append(line)
        waiting.set()

    def wait() -> None:
        with extensions._lock_folder(tmp_path, report):
            entered.set()

    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(30)
        assert not entered.is_set()
    finally:
        holder.kill()  # and the lock is gone with it
        holder.communicate()
    assert entered.wait(30)
    thread.join()
    assert "waiting for another process that builds in" in said[0]


def test_a_long_build_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_LINE_SECONDS", 0.01)
    spoken = threading.Event()
    with extensions._report_progress("building it", lambda line: spoken.set()):
        assert spoken.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_locks_of_a_killed_build_hold_nobody_up() -> None:
    cache = cache_folder(os.environ)  # the user's own, so that it is built once on a machine
    command = [sys.executable, "-c", _PREPARE, str(cache)]
    subprocess.run(command, check=True)
    built = cache / "extensions" / extensions._make_key()
    for operation in ("pin_memory", "async_io"):
        (built / operation / "lock").touch()
    for process in [subprocess.Popen(command) for _ in range(2)]:
        assert process.wait(timeout=120) == 0
    assert not list(built.glob("*/lock"))
