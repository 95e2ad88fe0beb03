"""What is refused before a weight is loaded, and the sentence that says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.engine import EngineError
from batchgen.engines.ds_zero.checks import check_folder, check_host_memory, check_space, read_lockable_bytes
from batchgen.engines.ds_zero.offload import Offload

TB = 10**12

# As a user without rights beyond the ordinary ones: root may lock any amount.
_LOCK = """
import os, resource, sys
from batchgen.engine import EngineError
from batchgen.engines.ds_zero.checks import check_locked_memory
from batchgen.engines.ds_zero.offload import Offload
from batchgen.engines.ds_zero.checks import read_lockable_bytes
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 8_000_000))
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
print(read_lockable_bytes())
check_locked_memory(Offload({}, {}, 0, 7_000_000, 0, 0))
print(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
try:
    check_locked_memory(Offload({}, {}, 0, 9_000_000, 0, 0))
except EngineError as error:
    print(error)
"""


def needing(*, host: int = 0, files: int = 0, nvme: bool = True) -> Offload:
    return Offload({}, {} if nvme else None, host, 0, files, 0)


def test_a_folder_on_a_disk_will_do_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"nvme0: there is no such folder here\. Create it, or mount"):
        check_folder(tmp_path / "nvme0")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(EngineError, match="offload=nvme=/proc: cannot write there: "):
        check_folder(Path("/proc"))


def test_the_ranks_of_a_host_need_room_for_all_their_files(tmp_path: Path) -> None:
    check_space(needing(files=1000), tmp_path, 8)
    with pytest.raises(EngineError, match=r"8 ranks take 8,000,000\.0 GB there, and [\d,.]+ GB are free. Make room"):
        check_space(needing(files=1000 * TB), tmp_path, 8)


def test_the_ranks_of_a_host_need_its_memory() -> None:
    check_host_memory(needing(host=1000), 8)
    with pytest.raises(
        EngineError, match=r"takes 2,000\.0 GB of this host's memory for its 2 ranks.*use fewer buffers"
    ):
        check_host_memory(needing(host=TB), 2)
    with pytest.raises(EngineError, match="use offload=nvme=FOLDER"):
        check_host_memory(needing(host=TB, nvme=False), 2)


def test_what_may_be_locked_is_the_hard_limit_and_a_lower_soft_one_is_raised() -> None:
    done = subprocess.run([sys.executable, "-c", _LOCK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    limit, raised, sentence = done.stdout.splitlines()
    assert limit == raised == "8000000"
    assert "needs 9.0 MB of locked memory in each rank for its buffers, and the limit (ulimit -l) is 8.0 MB" in sentence


def test_there_is_a_limit_or_there_is_none() -> None:
    limit = read_lockable_bytes()
    assert limit is None or limit > 0
