"""The text of ZeRO streams beside that of one process: each model, number of ranks and place where weights wait.

    python -m tests.engines.ds_zero.zero_matrix [NAME …]

compares all of `EVERY`, or those of some models, row for row, and prints a line for each. The suite lives through
`COVERING`, in which each two of model, ranks and place meet. From NVMe, models are wide: DeepSpeed leaves shards below
1 MiB in memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batchgen.engine import Setup
from batchgen.engines.accelerate import Accelerate
from batchgen.models import cache_folder, prepare_default
from batchgen.types import Generation, Prompt
from batchgen.world import World
from tests import tiny_models as models
from tests.engines import engine_rank


class Case(NamedTuple):
    """One start of ranks."""

    name: str  # of the model: bloom, llama or smollm2
    ranks: int
    place: str  # where the weights wait for their layer: none, cpu or nvme

    @property
    def most_tokens(self) -> int:
        """Of a prompt; fewer where each rank brings many megabytes over for every one."""
        return 12 if self.name == "smollm2" or self.place == "nvme" else 40


EVERY = [Case(*one) for one in product(("bloom", "llama", "smollm2"), (2, 3), ("none", "cpu", "nvme"))]
COVERING = [
    Case("bloom", 3, "none"),
    Case("bloom", 3, "cpu"),
    Case("bloom", 2, "nvme"),
    Case("llama", 2, "none"),
    Case("llama", 2, "cpu"),
    Case("llama", 3, "nvme"),
    Case("smollm2", 2, "none"),
    Case("smollm2", 3, "cpu"),
    Case("smollm2", 2, "nvme"),
]

# A third of 896 x 896 in float32 is above 1 MiB. BLOOM's embeddings are tied, and as large.
_WIDE_BLOOM = {"hidden_size": 896, "n_head": 8}
_WIDE_LLAMA = {"hidden_size": 896, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
_WIDE_VOCABULARY = 3000


def model(name: str, folder: Path, *, wide: bool, **settings: Any) -> Path:
    """The model of that name, made in `folder` unless it is there; SmolLM2 is the one of the user's own cache."""
    if name == "smollm2":
        return prepare_default(cache_folder(os.environ), print)
    made = folder / f"{'wide' if wide else 'tiny'}-{name}"
    if made.exists():
        return made
    build, shape = (models.bloom, _WIDE_BLOOM) if name == "bloom" else (models.llama, _WIDE_LLAMA)
    return models.save(made, partial(_wide, build), **{**shape, **settings}) if wide else models.save(made, build)


def _wide(build: Callable[..., Any], vocabulary: int, **shape: Any) -> Any:
    """A model of more words than its tokenizer has, which never says one of those: they would decode to nothing."""
    made = build(_WIDE_VOCABULARY, **shape)
    with torch.no_grad():
        made.get_output_embeddings().weight[vocabulary:] = 0
    return made


def alone(folder: Path, prompts: Sequence[Prompt]) -> dict[int, Generation]:
    """What engine `accelerate` makes of them in one process."""
    with Accelerate(Setup(str(folder), "float32", 4, World()), Accelerate.Options()) as engine:
        batches = engine.generate(iter(prompts), lambda: False)
        return {generation.index: generation for batch in batches for generation in batch.generations}


def check_logprobs(found: Mapping[int, Sequence[float]], expected: Mapping[int, Generation]) -> None:
    """Those of ranks against those of one process.

    Raises:
        AssertionError: they differ, or are not those of the prompts that ask.
    """
    asked = {index: one.logprobs for index, one in expected.items() if one.logprobs is not None}
    assert asked
    assert found.keys() == asked.keys()
    for index, values in asked.items():
        assert len(values) == expected[index].generated_tokens == len(found[index])
        assert all(abs(one - other) < 1e-4 for one, other in zip(values, found[index], strict=True)), index


def options(place: str, scratch: Path) -> list[str]:
    """Settings of engine `ds-zero`; swap files go into a folder in `scratch`."""
    if place == "none":
        return []
    if place == "cpu":
        return ["offload=cpu"]
    disk = scratch / "disk"
    disk.mkdir()
    return [f"offload=nvme={disk}"]


def compare(
    case: Case, folder: Path, scratch: Path, sets: Sequence[int], patience: float = engine_rank.PATIENCE
) -> list[int]:
    """Runs the ranks, and checks each set's texts; how many swap files each rank had.

    Raises:
        AssertionError: a rank fails, a text differs, or nothing was in swap files.
    """
    settings = options(case.place, scratch)
    texts = engine_rank.ranks(case.ranks, folder, settings, scratch / "ranks", sets, case.most_tokens, patience)
    logprobs = engine_rank.logprobs(scratch / "ranks")
    for count in sets:
        expected = alone(folder, engine_rank.prompts(count, case.most_tokens))
        assert len(expected) == count
        wrong = [index for index in expected if texts[count].get(index) != expected[index].text]
        assert texts[count].keys() == expected.keys(), f"{case}, {count} prompts: rows are missing"
        assert not wrong, f"{case}, {count} prompts: rows {wrong} differ"
        check_logprobs(logprobs[count], expected)
    swapped = engine_rank.swap_files(scratch / "ranks")
    assert len(swapped) == case.ranks
    assert all(files > 0 for files in swapped) == (case.place == "nvme"), f"{case}: {swapped} swap files"
    return swapped


def write(line: str) -> None:
    """A line of the result, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(names: Sequence[str]) -> int:
    """Prints a line for each case; the exit code."""
    failed = 0
    write(f"Prompts: {', '.join(map(str, engine_rank.SETS))}\n")
    write("| model | ranks | offload | text | swap files of each rank | seconds |\n|---|--:|---|---|---|--:|")
    with tempfile.TemporaryDirectory(prefix="batchgen-matrix-") as name:
        for number, case in enumerate(EVERY):
            if names and case.name not in names:
                continue
            begun = time.perf_counter()
            scratch = Path(name, str(number))
            scratch.mkdir()
            folder = model(case.name, Path(name), wide=case.place == "nvme")
            try:
                swapped = compare(case, folder, scratch, engine_rank.SETS, 3600)
                found = "equal"
            except AssertionError as error:
                swapped, found = [], " ".join(str(error).split())[-300:]
                failed += 1
            cells = (*case, found, ", ".join(map(str, swapped)), f"{time.perf_counter() - begun:.0f}")
            write(f"| {' | '.join(map(str, cells))} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
