"""Lines of 64 MB, good and bad: a few times their size in memory, however many of them there are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.bad_input.command import answered
from tests.commands.starts import ENVIRONMENT, batchgen

SIZE = 64 << 20
SMALL = b'{"id":"%s","prompt":"p"}\n'


def peak(folder: Path, *arguments: str) -> tuple[int, int]:
    """The exit code of `batchgen ARGUMENTS…`, and the most bytes that it had in memory."""
    process = subprocess.Popen(batchgen(*arguments), cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024  # Linux counts it in KiB


def run(folder: Path, *lines: bytes) -> tuple[int, int]:
    """The same for a file of these lines, beyond what a file of nothing takes."""
    path = folder / "a.jsonl"
    path.write_bytes(SMALL % b"only")
    _, least = peak(folder, "run", "a.jsonl", "-o", "small", "--engine", "echo")
    with path.open("wb") as file:
        file.writelines([SMALL % b"before", *lines, SMALL % b"after"])
    code, most = peak(folder, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    return code, most - least


def test_lines_of_64_megabytes_take_a_few_times_as_much(tmp_path: Path) -> None:
    text = b"word " * (SIZE // 5)
    code, taken = run(
        tmp_path, b'{"id":"long","prompt":"' + text + b'"}\n', b'{"prompt":"' + text + b"\n", b"[" * SIZE + b"\n"
    )
    assert code == 3
    first, long, cut, deep, last = answered(tmp_path / "out")
    assert [row["text"] for row in (first, long, last)] == ["p", text[:128].decode(), "p"]
    assert len(long["prompt"]) == len(text)
    assert cut["error"]["message"].startswith("line 3 of a.jsonl is not valid JSON: Unterminated string")
    assert deep["error"]["message"] == "line 4 of a.jsonl has lists or objects more than 200 levels deep"
    assert taken < 7 * SIZE, f"{taken / SIZE:.1f} times the longest line"


def test_a_character_beyond_the_others_makes_each_take_four_bytes(tmp_path: Path) -> None:
    line = b'{"prompt":"' + b"word " * (SIZE // 40) + "🙂".encode() + b'"}\n'
    code, taken = run(tmp_path, line)
    assert code == 0
    assert taken < 17 * len(line), f"{taken / len(line):.1f} times the line"
