"""The files in jobs/: each is what its source says, and each is submitted to a real Slurm once its lines are edited."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "jobs").glob("*.sbatch"))}
SOURCE: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "jobs"))["JOBS"]


def test_the_files_are_what_their_source_says() -> None:
    assert FILES.keys() == SOURCE.keys()
    for name, path in FILES.items():
        assert path.read_text() == SOURCE[name].text(), f"{path} is not what scripts/jobs makes"


def test_the_page_says_which_one() -> None:
    page = (ROOT / "jobs" / "README.md").read_text()
    assert set(re.findall(r"\[`(.*?)\.sbatch`\]\(\1\.sbatch\)", page)) == FILES.keys()


def test_every_engine_has_a_file() -> None:
    from batchgen import engines

    assert set(engines.names()) <= FILES.keys()


def edited(text: str, values: dict[str, str]) -> str:
    """The file with its lines that are marked EDIT edited, and no other."""
    lines = []
    for line in text.splitlines():
        found = re.fullmatch(r"((?:#SBATCH --)?([\w-]+)=|(source) ).*?(\s+# EDIT.*)", line)
        if found is not None:
            line = f"{found[1]}{values[found[2] or found[3]]}{found[4]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, a script that makes `batchgen` a command, and the texts as one process says them."""
    made = tmp_path_factory.mktemp("files")
    with (made / "p.jsonl").open("w") as file:
        for number in range(12):
            file.write(
                json.dumps({"prompt": "abcdefh " * (1 + number % 5), "max_new_tokens": 3 + 7 * (number % 3)}) + "\n"
            )
    (made / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    words = [sys.executable, "-m", "batchgen", "run", "p.jsonl", "-o", "alone", "--model", str(tiny_llama)]
    subprocess.run(words, cwd=made, check=True, capture_output=True)
    return made


def texts(run: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (run / "generations.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)  # reads past the page cache are compiled once on a machine
@pytest.mark.parametrize("name", sorted(FILES))
def test_the_file_runs_as_it_stands_once_it_is_edited(
    name: str, cluster: Cluster, folder: Path, tiny_llama: Path
) -> None:
    values = {
        "prompts": "p.jsonl",
        "out": f"'out {name}'",
        "model": str(tiny_llama),
        "tp": "2",
        "disk": str(folder),
        "shards": "2",
        "source": "./activate",
        "nodes": "2" if name.endswith("-nodes") else "1",
        "ntasks-per-node": "1" if name == "array" else "2",
        "gpus-per-node": "1" if name == "array" else "2",
        "cpus-per-task": "1",
        "mem": "1000",
        "time": "10",
        "array": "0-1",
    }
    (folder / f"{name}.sbatch").write_text(edited(FILES[name].read_text(), values))
    job = cluster.run("sbatch", "--parsable", f"--chdir={folder}", folder / f"{name}.sbatch")
    state = cluster.wait(job, "COMPLETED", "FAILED", "COMPLETED FAILED", seconds=800)
    log = "".join(path.read_text() for path in sorted(folder.glob(f"batchgen-{job}*.out")))
    assert state == "COMPLETED", log
    run = folder / f"out {name}"
    if name == "echo":
        assert len(texts(run)) == 12
        return
    assert texts(run) == texts(folder / "alone")
    attempts = [json.loads(path.read_text()) for path in run.glob("attempts/?????.json")]
    wanted = 2 if name == "array" else 1
    assert len(attempts) == wanted, log
    tasks = 1 if name == "array" else int(values["nodes"]) * int(values["ntasks-per-node"])
    assert {attempt["ranks"] for attempt in attempts} == {tasks}
    hosts = {int(path.stem[-5:]): json.loads(path.read_text())["host"] for path in run.glob("attempts/*-*.json")}
    if cluster.has_namespaces and name.endswith("-nodes"):
        # Ranks that follow each other are on one node, and so are those of a tensor-parallel group.
        assert [hosts[rank] for rank in range(4)] == ["node1", "node1", "node2", "node2"]
