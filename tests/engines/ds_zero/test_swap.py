"""The folder of a run's swap files: whose it is, and when it goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.engine import EngineError
from batchgen.engines.ds_zero.swap import SwapFolder

_RANK = """
import sys, time
from pathlib import Path
from batchgen.engines.ds_zero.swap import SwapFolder
swap = SwapFolder(Path(sys.argv[1]), "run", 1)
swap.open()
print("open", flush=True)
time.sleep(600)
"""


def write(swap: SwapFolder, rank: int) -> Path:
    """A file as DeepSpeed makes them."""
    file = swap.path / "zero_stage_3" / "float32params" / f"rank{rank}" / "0_param.tensor.swp"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return file


def test_the_folder_is_named_after_the_run_and_goes_with_its_last_rank(tmp_path: Path) -> None:
    ranks = [SwapFolder(tmp_path, "run", rank) for rank in range(2)]
    ranks[0].clean()
    for number, rank in enumerate(ranks):
        rank.open()
        write(rank, number)
    assert [folder.name for folder in tmp_path.iterdir()] == [ranks[0].path.name]
    assert len(ranks[0].path.name) == len("batchgen-") + 16
    ranks[0].close()
    assert [file.parent.name for file in tmp_path.rglob("*.swp")] == ["rank1"]
    ranks[1].close()
    ranks[1].close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_attempt_left_is_removed_and_another_runs_files_are_not(tmp_path: Path) -> None:
    other = SwapFolder(tmp_path, "another run", 0)
    other.open()
    theirs = write(other, 0)
    killed = subprocess.Popen([sys.executable, "-c", _RANK, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"open\n"
        swap = SwapFolder(tmp_path, "run", 0)
        left = write(swap, 1)
        with pytest.raises(
            EngineError, match="in use by a process of an earlier attempt of this run; end that process"
        ):
            swap.clean(patience=0)
        assert left.exists()
    finally:
        killed.kill()
        killed.communicate()
    swap.clean()
    assert not swap.path.exists()
    assert theirs.exists()
    swap.clean()  # nothing to do


def test_two_processes_cannot_be_one_rank(tmp_path: Path) -> None:
    first, second = SwapFolder(tmp_path, "run", 0), SwapFolder(tmp_path, "run", 0)
    first.open()
    with pytest.raises(EngineError, match=r"rank 0's part of .* is in use by another process"):
        second.open()
    first.close()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot make swap files in .*file/batchgen-"):
        SwapFolder(tmp_path / "file", "run", 0).open()
