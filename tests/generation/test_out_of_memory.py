"""Running out of memory, really: a process whose address space is limited after the model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import tiny_models as models

_OUT_OF_MEMORY = """
import json, resource, sys
import torch
from batchgen.types import Prompt, SamplingParams
from tests.tiny_models import Model
from pathlib import Path

model = Model(Path(sys.argv[1]), batch_size=64)

def prompt(number, length):
    return Prompt(number, str(number), number + 1, "", [1] + [9] * (length - 1), SamplingParams(max_new_tokens=3), {})

model.run([prompt(0, 8)])
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 90 * 2**20,) * 2)
sizes, failed, ahead, pulled = [], [], [], []

def prompts():
    for number in range(200):
        pulled.append(number)
        yield prompt(number, 3000 if number == 30 else 8)

for batch in model.batches.run(prompts(), lambda: False):
    good = [generation for generation in batch.generations if generation.error is None]
    failed += [generation for generation in batch.generations if generation.error]
    sizes.append(len(good))
    ahead.append(len(pulled) - sum(sizes) - len(failed))
    assert all(generation.text is not None and generation.prompt_tokens == 8 for generation in good)
print(json.dumps(sizes))
print(json.dumps(ahead))
print(json.dumps([(each.index, each.error.type, each.error.message) for each in failed]))
"""


def test_out_of_memory_halves_the_batch_remembers_and_refuses_only_what_never_fits(tmp_path: Path) -> None:
    # 64 rows of logits, 100,000 wide, are 26 MB at each copy; 3,000 tokens through an MLP of 20,000 are 240 MB.
    folder = tmp_path / "wide"
    models.save(folder, lambda _, **more: models.llama(100_000, intermediate_size=20_000, hidden_size=8, **more))
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY, str(folder)],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "MALLOC_ARENA_MAX": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes, ahead, failed = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    assert sum(sizes) == 199
    assert max(sizes) < 64, "short prompts never ran out"
    assert ahead[-3:] == [0, 0, 0], "what was learnt did not shape the batches after it"
    ((index, kind, message),) = failed
    assert (index, kind) == (30, "out_of_memory")
    assert message.startswith("line 31: 3000 prompt tokens and up to 3 new ones do not fit into memory")
