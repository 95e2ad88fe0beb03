"""Jobs on a real Slurm: whatever ends one, it comes back, and the run ends with every row exactly once.

All jobs are submitted at the beginning, and work side by side; each test waits for its own. Only the last one, which
cuts a node's power, is alone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import LARGEST_ARRAY, Cluster

ROOT = Path(__file__).parents[2]

# For sitecustomize: rank 1 dies after a while, at every start of the job, or at once.
DIES = """
import os, signal, sys, threading
if os.environ.get("SLURM_PROCID") == "1" and "run" in sys.argv:
    after = float(os.environ["DIES_AFTER"])
    if after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
"""


@dataclass
class Submitted:
    """A job, in a folder of its own."""

    cluster: Cluster
    folder: Path
    out: str
    rows: int
    jobs: list[str]

    @property
    def job(self) -> str:
        return self.jobs[0]

    @property
    def run(self) -> Path:
        return self.folder / self.out

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.glob("jobs/*.out")))

    def batchgen(self, *words: str, code: int = 0) -> str:
        return batchgen(self.cluster, self.folder, *words, code=code)

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.batchgen("status", self.out, "--json"))
        return found

    def recorded(self) -> int:
        """Rows that are finished, as far as the files say."""
        return sum(path.read_text().count("\n") for path in self.run.glob("generations-*.jsonl"))

    def is_whole(self) -> None:
        """Every row is there exactly once, with its own text."""
        rows = [json.loads(line) for line in (self.run / "generations.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == [f"row {number}" for number in range(self.rows)]
        assert (self.run / "errors.jsonl").read_text() == ""

    def starts(self) -> int:
        """How often it has begun."""
        return len(list(self.run.glob("attempts/?????.json")))


def batchgen(cluster: Cluster, folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "batchgen", *words],
        cwd=folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, f"{words}: {done.stderr}"
    return done.stdout


def submit(
    cluster: Cluster,
    folder: Path,
    options: str,
    rows: int,
    seconds: float,
    *,
    out: str = "out",
    setup: tuple[str, ...] = (),
    prompts: str = "prompts.jsonl",
    more: str = "",
) -> Submitted:
    """Submits a run of engine `echo`, in batches of 2 rows that take `seconds` a row."""
    folder.mkdir(parents=True)
    (folder / prompts).write_text("".join(f'{{"prompt": "row {number}"}}\n' for number in range(rows)) + more)
    if setup:
        (folder / "slurm.toml").write_text(f"setup = {json.dumps(setup)}\n")
    words = ["run", prompts, "-o", out, "--engine", "echo", "--batch-size", "2", "--set", f"seconds={seconds}"]
    words += ["--heartbeat-seconds", "0.2"]
    jobs = batchgen(cluster, folder, "submit", *shlex.split(options), "--", *words).split()
    return Submitted(cluster, folder, out, rows, jobs)


def dying(folder: Path, after: float) -> tuple[str, ...]:
    site = folder.with_name(f"{folder.name}-site")
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(DIES)
    return (f"export DIES_AFTER={after} PYTHONPATH={site}:{ROOT}",)


TWO_BY_TWO = "--nodes=2 --ntasks-per-node=2 --time=10"
ONE_OF_FIVE = ('[ "$SLURM_ARRAY_TASK_ID" != 3 ] || [ -e mended ] || exit 9',)
NASTY = ["a b", "a'b", 'a"b', "a;b", "a$b%d"]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Submitted]:
    """All jobs of this module."""
    top = tmp_path_factory.mktemp("jobs")
    made = {
        # Slurm looks at limits every half minute, and warns half a minute early: 30 to 60 s after the start.
        "limit": submit(cluster, top / "limit", f"{TWO_BY_TWO} --time=2 --signal=USR1@60", 480, 0.6),
        "warned array": submit(cluster, top / "warned", "--array 2 --time=2 --signal=USR2@60", 160, 0.8),
        "requeue": submit(cluster, top / "requeue", TWO_BY_TWO, 160, 0.6),
        "array": submit(cluster, top / "array", "--array 5%4 --ntasks=2 --time=5", 60, 0.1, setup=ONE_OF_FIVE),
        "large": submit(cluster, top / "large", f"--array {LARGEST_ARRAY + 3} --time=5", 40, 0.05),
        "hopeless": submit(cluster, top / "hopeless", TWO_BY_TWO, 40, 0.5, setup=dying(top / "hopeless", 0)),
        "capped": submit(
            cluster, top / "capped", f"{TWO_BY_TWO} --max-requeues 1", 400, 0.5, setup=dying(top / "capped", 3)
        ),
        "chain": submit(cluster, top / "chain", f"{TWO_BY_TWO} --chain 4", 40, 0.3, setup=dying(top / "chain", 3)),
        "bad": submit(cluster, top / "bad", "--time=5", 6, 0, more='{"prompt": 5}\n'),
        "lost": submit(cluster, top / "lost", f"{TWO_BY_TWO} --chain 3", 40, 0.5, setup=dying(top / "lost", 0)),
        "cancelled": submit(cluster, top / "cancelled", "--ntasks=2 --time=5 --chain 3", 400, 0.5),
    }
    for number, name in enumerate(NASTY):
        made[name] = submit(
            cluster, top / f"{number} {name}", "--ntasks=2 --time=5", 8, 0, out=f"out {name}", prompts=f"{name}.jsonl"
        )
    return made


@pytest.mark.slow
def test_a_job_that_is_requeued_goes_on(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["requeue"]
    cluster.until(lambda: job.recorded() >= 4)
    assert job.status()["state"] == "running"
    assert f"{job.job}: RUNNING on node[1-2]" in job.batchgen("status", job.out)
    cluster.run("scontrol", "requeue", job.job)
    cluster.wait(job.job, "PENDING")
    assert f"{job.job}: PENDING" in job.batchgen("status", job.out)
    cluster.wait(job.job, "COMPLETED")
    job.is_whole()
    assert job.starts() == 2


@pytest.mark.slow
def test_a_cancelled_run_leaves_no_job_behind_and_keeps_what_is_finished(
    cluster: Cluster, jobs: dict[str, Submitted]
) -> None:
    job = jobs["cancelled"]
    cluster.until(lambda: job.recorded() >= 4)
    assert set(job.batchgen("cancel", job.out).split()) == set(job.jobs)
    for one in job.jobs:
        cluster.wait(one, "CANCELLED")
    assert job.status()["state"] == "stopped"
    assert 4 <= int(str(job.status()["good"])) < job.rows
    assert job.batchgen("cancel", job.out) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_safe(name: str, cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs[name]
    assert cluster.wait(job.job, "COMPLETED", "FAILED") == "COMPLETED", job.log
    job.is_whole()
    assert (job.folder / f"{job.out}.sbatch").exists()
    assert "8 of 8 rows good" in job.log


@pytest.mark.slow
def test_of_an_array_status_names_the_task_that_failed_and_prints_what_finishes_it(
    cluster: Cluster, jobs: dict[str, Submitted]
) -> None:
    job = jobs["array"]
    cluster.wait(job.job, "COMPLETED FAILED")
    assert not (job.run / "generations.jsonl").exists()
    said = job.batchgen("status", job.out)
    assert "missing shards 3 of 5" in said
    again = next(line for line in said.splitlines() if line.startswith("  again "))
    assert again.split()[1:] == ["sbatch", "--array=3", f"{job.folder}/out.sbatch"]
    (job.folder / "mended").touch()
    retried = cluster.run(
        *shlex.split(again)[1:],
    ).split()[-1]
    cluster.wait(retried, "COMPLETED")
    job.is_whole()
    said = job.batchgen("status", job.out)
    assert "finished" in said
    assert "again" not in said


@pytest.mark.slow
def test_a_run_of_more_shards_than_an_array_may_have_takes_two(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["large"]
    assert len(job.jobs) == 2
    for one in job.jobs:
        cluster.wait(one, "COMPLETED")
    job.is_whole()
    shards = {json.loads(path.read_text())["shard"] for path in job.run.glob("attempts/?????.json")}
    assert shards == {f"{index}/{LARGEST_ARRAY + 3}" for index in range(LARGEST_ARRAY + 3)}


@pytest.mark.slow
def test_a_job_that_cannot_go_on_is_not_requeued(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["hopeless"]
    cluster.wait(job.job, "FAILED")
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job.job)
    assert "not starting again: this start has finished no row" in job.log
    assert "gave up: this start has finished no row" in job.batchgen("status", job.out)


@pytest.mark.slow
def test_rows_that_have_failed_are_no_reason_to_begin_again(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["bad"]
    cluster.wait(job.job, "FAILED")
    assert "Restarts=0" in (known := cluster.run("scontrol", "show", "job", job.job))
    assert "ExitCode=3:0" in known
    assert len((job.run / "errors.jsonl").read_text().splitlines()) == 1
    # Submitted again, they are tried again.
    again = cluster.run("sbatch", "--parsable", job.folder / "out.sbatch")
    cluster.wait(again, "FAILED")
    assert job.starts() == 2


@pytest.mark.slow
def test_a_job_is_requeued_only_so_often(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["capped"]
    cluster.wait(job.job, "FAILED")
    assert job.starts() == 2
    assert "has been requeued 1 times, and may not be again" in job.log


@pytest.mark.slow
def test_the_jobs_of_a_chain_follow_each_other_until_all_is_done(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["chain"]
    cluster.until(lambda: {cluster.state(one) for one in job.jobs} <= {"COMPLETED", "FAILED", "CANCELLED"}, 120)
    states = [cluster.state(one) for one in job.jobs]
    done = states.index("COMPLETED")
    assert states == ["FAILED"] * done + ["COMPLETED"] + ["CANCELLED"] * (3 - done), job.log
    assert 1 <= done == job.starts() - 1
    job.is_whole()


@pytest.mark.slow
def test_a_chain_gives_up_as_a_whole(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["lost"]
    for one in job.jobs:
        cluster.wait(one, "FAILED")
    assert job.starts() <= 1, "the others have not even tried"
    assert job.log.count("not starting again: this start has finished no row") == 3


@pytest.mark.slow
def test_a_job_comes_back_after_its_time_limit(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["limit"]
    cluster.wait(job.job, "COMPLETED", seconds=200)
    job.is_whole()
    assert job.starts() >= 2
    assert "requeued, to go on" in job.log
    ends = [json.loads(path.read_text())["ended"] for path in sorted(job.run.glob("attempts/?????.json"))]
    assert set(ends[:-1]) == {"stopped by SIGUSR2"}


@pytest.mark.slow
def test_each_task_of_an_array_comes_back_by_itself(cluster: Cluster, jobs: dict[str, Submitted]) -> None:
    job = jobs["warned array"]
    cluster.wait(job.job, "COMPLETED", seconds=200)
    job.is_whole()
    claims = [json.loads(path.read_text()) for path in job.run.glob("attempts/?????.json")]
    assert sorted(claim["shard"] for claim in claims if claim["restarts"] == 1) == ["0/2", "1/2"]


@pytest.mark.slow
def test_a_preempted_job_comes_back(cluster: Cluster, jobs: dict[str, Submitted], tmp_path: Path) -> None:
    cluster.until(lambda: not cluster.run("squeue", "-h"), 200)
    job = submit(cluster, tmp_path / "job", TWO_BY_TWO, 40, 0.6)
    cluster.until(lambda: job.recorded() >= 4)
    words = ["-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    higher = cluster.run("sbatch", "--parsable", *words)
    cluster.wait(higher, "RUNNING")
    assert cluster.state(job.job) == "PENDING"
    cluster.wait(job.job, "COMPLETED")
    job.is_whole()
    assert job.starts() == 2


@pytest.mark.slow
def test_a_job_whose_node_loses_power_in_a_batch_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.has_namespaces:
        pytest.skip("a node has no power of its own: this needs root")
    job = submit(cluster, tmp_path / "job", TWO_BY_TWO, 60, 0.6)
    cluster.until(lambda: job.recorded() >= 4)
    time.sleep(0.3)
    cluster.power_off("node2")
    cluster.power_on("node2")
    cluster.wait(job.job, "COMPLETED", seconds=200)
    job.is_whole()
    assert job.starts() >= 2


@pytest.mark.slow
def test_a_start_without_srun_is_refused_with_the_remedy(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    run = shlex.join([sys.executable, "-m", "batchgen", "run", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out")])
    words = ["-N2", "--ntasks-per-node=2", "-o", str(tmp_path / "log"), "--wrap", f"{run} --engine echo"]
    job = cluster.run("sbatch", "--parsable", *words)
    cluster.wait(job, "FAILED")
    assert "has 2 node(s) and 4 tasks" in (tmp_path / "log").read_text()
    assert "Put srun in front" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out").exists()
