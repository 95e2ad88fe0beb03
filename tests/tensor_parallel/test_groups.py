"""What the first rank of a group tells the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOLD = """
import os, sys
from datetime import timedelta
import numpy as np
import torch
import torch.distributed as dist
from batchgen.tensor_parallel import Group
from batchgen.world import from_environment

dist.init_process_group("gloo")
world = from_environment(os.environ)
group = Group(world, range(world.rank // 2 * 2, world.rank // 2 * 2 + 2), torch.device("cpu"), timedelta(seconds=60))
for size in (0, 1, 8190, 8191, 8192, 30_000):
    said = np.arange(size) * (world.rank // 2 - 2**40)
    if world.rank % 2 == 0:
        group.tell(said)
    else:
        assert np.array_equal(group.told(), said), size
os.write(1, b"heard\\n" if world.rank % 2 else b"said\\n")  # at once: the others write there, too
"""


@pytest.mark.slow
def test_what_is_told_stays_in_the_group_and_may_be_of_any_length() -> None:
    command = ["torchrun", "--standalone", "--nproc-per-node", "4", "--no-python", sys.executable, "-c", TOLD]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ["heard", "heard", "said", "said"]
