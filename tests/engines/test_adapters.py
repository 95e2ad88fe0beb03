"""Every engine generates with an adapter what it generates with the model into which peft has merged it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.world import free_port
from tests import adapters
from tests.engines.adapters_on_ranks import Found, generate

ENGINES = {
    "ds-zero": ("ds-zero", []),
    "ds-zero by DeepSpeed": ("ds-zero", ["whole_layers=false"]),
    "ds-zero from the host": ("ds-zero", ["offload=cpu"]),
    "ds-inference": ("ds-inference", []),
    "paged in a group": ("paged", ["tp=2"]),
}
COVERED_BY_PAGED = ("llama", "bloom", "mixtral", "phi3")
# Of the cases of `adapters.CASES`, those whose weights are cut in different ways.
CASES = [
    ("llama", "rank-stabilised, of several ranks and alphas"),
    ("llama", "DoRA"),
    ("llama", "whole ends"),
    ("llama", "ends as products"),
    ("bloom", "fused, every bias"),
    ("bloom", "fused, biases of its layers"),
    ("mixtral", "experts and router"),
    ("phi3", "fused projections"),
]
TASKS = [
    (base, case, way)
    for base, case in CASES
    for way in ENGINES
    if (way != "paged in a group" or base in COVERED_BY_PAGED)
    and (
        way in ("ds-zero", "ds-inference", "paged in a group") or case == "rank-stabilised, of several ranks and alphas"
    )
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path, Path]]:
    """Base, adapter and merged model of each case."""
    folder = tmp_path_factory.mktemp("adapters")
    bases = {name: adapters.save_base(folder / name, name) for name in {base for base, _ in CASES}}
    made = {}
    for number, (base, case) in enumerate(CASES):
        adapter, merged = folder / f"adapter-{number}", folder / f"merged-{number}"
        made[base, case] = (bases[base], adapter, merged)
        adapters.save_adapter(bases[base], adapter, adapters.CASES[base][case], merged=merged)
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[tuple[str, str], tuple[Path, Path, Path]]) -> dict[tuple[str, str], Found]:
    """What `accelerate` generates with the merged model."""
    return {case: generate("accelerate", [], str(merged), "") for case, (_, _, merged) in folders.items()}


@pytest.fixture(scope="module")
def on_ranks(
    folders: dict[tuple[str, str], tuple[Path, Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Found]:
    """What two ranks generate in each of `TASKS`."""
    result = tmp_path_factory.mktemp("ranks")
    tasks = []
    for number, (base, case, way) in enumerate(TASKS):
        engine, options = ENGINES[way]
        model, adapter, _ = folders[base, case]
        tasks.append([str(number), engine, options, str(model), str(adapter), free_port()])
    command = [sys.executable, "-m", "tests.engines.adapters_on_ranks", json.dumps(tasks), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment["MASTER_ADDR"] = "127.0.0.1"
    started = []
    for rank in range(2):
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (result / f"log-{rank}").open("w") as log:
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(started):
            assert process.wait(timeout=280) == 0, (result / f"log-{rank}").read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    found: dict[tuple[str, str, str], Found] = {}
    for number, task in enumerate(TASKS):
        for rank in (0, 1):
            found.setdefault(task, {}).update(json.loads((result / f"{number}-{rank}").read_text()))
    return found


def check(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    assert sum(len(logprobs) for _, logprobs in expected.values()) > 20
    for index, (text, logprobs) in expected.items():
        assert found[index][0] == text
        assert found[index][1] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("engine", ["accelerate", "paged"])
@pytest.mark.parametrize(("base", "case"), CASES[:6:2], ids=[case for _, case in CASES[:6:2]])
def test_a_rank_alone(
    engine: str,
    base: str,
    case: str,
    folders: dict[tuple[str, str], tuple[Path, Path, Path]],
    expected: dict[tuple[str, str], Found],
) -> None:
    model, adapter, _ = folders[base, case]
    check(generate(engine, [], str(model), str(adapter)), expected[base, case])
    assert generate(engine, [], str(model), "") != generate(engine, [], str(model), str(adapter))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "case", "way"), TASKS, ids=[f"{case}, {way}" for _, case, way in TASKS])
def test_two_ranks(
    base: str,
    case: str,
    way: str,
    on_ranks: dict[tuple[str, str, str], Found],
    expected: dict[tuple[str, str], Found],
) -> None:
    check(on_ranks[base, case, way], expected[base, case])
