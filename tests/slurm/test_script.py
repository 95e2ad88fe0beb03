"""Scripts without a cluster: what is typed, what a site says, and what comes of it; sbatch itself reads the values."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from batchgen import slurm
from batchgen.commands import main
from tests.slurm.cluster import Cluster


def submit(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """`batchgen submit` in `folder`, with a home of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    (folder / "p.jsonl").write_text('{"prompt": "x"}\n')
    return CliRunner().invoke(main, ["submit", *words])


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


RUN = ("--", "run", "p.jsonl", "-o", "out", "--engine", "echo")


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        (
            ["-N2", "-t", "5", "--gpus-per-node", "a100:4"],
            ["nodes=2", "time=5", "gpus-per-node=a100:4", "ntasks-per-node=4"],
        ),
        (["--gres=gpu:h100:2"], ["gres=gpu:h100:2", "ntasks-per-node=2"]),
        (["--gres=gpu:3"], ["ntasks-per-node=3"]),
        (["-G", "8"], ["gpus=8", "ntasks=8"]),
        (["--gpus=8", "-n", "2"], ["ntasks=2"]),
        (["--exclusive", "-H", "--qos=long"], ["exclusive", "qos=long"]),
        (["--signal=USR1@300"], ["signal=B:USR1@300"]),
        (["--open-mode=truncate"], ["open-mode=truncate"]),
        (['--comment=a "b" \\c'], ['comment="a \\"b\\" \\\\c"']),
        ([], ["open-mode=append", "requeue", "signal=B:USR2@120"]),
    ],
)
def test_options_of_sbatch_are_lines_of_the_script(
    typed: list[str], written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = submit(tmp_path, monkeypatch, "--print", *typed, *RUN)
    assert done.exit_code == 0, done.output
    lines = directives(done.stdout)
    assert {f"--{line}" for line in written} <= set(lines)
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names)), "an option stands there twice"
    assert not list(tmp_path.glob("out*")), "--print writes nothing"


def test_what_is_typed_comes_before_the_working_folder_and_that_before_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config" / "batchgen").mkdir(parents=True)
    (tmp_path / "config" / "batchgen" / "slurm.toml").write_text(
        'account = "home"\npartition = "home"\nmodules = ["cuda/12.4", "x y"]\n'
        '[sbatch]\nconstraint = "a100"\nexclusive = true\n'
    )
    (tmp_path / "slurm.toml").write_text('partition = "here"\nsetup = ["export A=1"]\nsrun = ["--cpu-bind=none"]\n')
    text = submit(tmp_path, monkeypatch, "--print", "-C", "h100", *RUN).stdout
    assert {"--account=home", "--partition=here", "--constraint=h100", "--exclusive"} <= set(directives(text))
    assert "\nmodule load cuda/12.4\nmodule load 'x y'\nexport A=1\n" in text
    assert "srun --kill-on-bad-exit=1 --wait=0 --distribution=block --cpu-bind=none \\" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--wrap=x", *RUN], "sbatch's own --wrap cannot be used here: the command stands behind --"),
        (["--dry-run", *RUN], "submit has no --dry-run: --print prints the script, and submits nothing"),
        (["--dry-run=yes", "--print", *RUN], "submit has no --dry-run: --print prints the script, and submits nothing"),
        ([*RUN, "--dry-run"], "--dry-run generates nothing, so that no job is needed: leave it out, or call"),
        (["--print", "--", "run", "none.jsonl", "-o", "out"], "there is no file none.jsonl"),
        (["--print", *RUN, "--model", "./none"], "./none"),
        (["--print", "--", "run-batch", "-i", "none.jsonl", "-o", "b.jsonl"], "there is no file none.jsonl"),
        (["3", *RUN], "'3' is no option of sbatch"),
        (["--print"], "there is no command behind --: it must be -- run …"),
        (["--print", "--", "status", "out"], "status makes no run"),
        (["--print", "--array=0-4", *RUN], "must be the number of shards, 2 or more"),
        (
            ["--print", "--array", "4", "--", "run-batch", "-i", "a.jsonl", "-o", "b.jsonl"],
            "--array splits a run into shards, which `run` knows and `run-batch` does not",
        ),
        (["--print", *RUN, "--shard", "5/5"], "there is no shard 5/5"),
        (["--print", *RUN, "--max-tokens", "5"], "No such option"),
    ],
)
def test_what_cannot_be_submitted_is_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = submit(tmp_path, monkeypatch, *words)
    assert done.exit_code != 0
    assert sentence in done.output


@pytest.mark.parametrize("text", ["account = 3", "modules = 'cuda'", "partitions = 'x'", "account ="])
def test_a_site_file_that_is_wrong_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm.toml").write_text(text)
    done = submit(tmp_path, monkeypatch, "--print", *RUN)
    assert done.exit_code == 4
    assert str(tmp_path / "slurm.toml") in done.output


def test_without_slurm_the_script_is_there_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit(tmp_path, monkeypatch, *RUN)
    assert done.exit_code == 4
    assert "out.sbatch is written, but was not submitted: there is no sbatch here" in done.output
    (tmp_path / "out.sbatch").write_text("edited\n")
    submit(tmp_path, monkeypatch, *RUN)
    assert (tmp_path / "out.sbatch.old").read_text() == "edited\n"


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_every_number(numbers: set[int]) -> None:
    found: list[int] = []
    for part in filter(None, slurm.ranges(sorted(numbers)).split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


def test_shards_are_tried_again_in_the_arrays_that_they_were_in() -> None:
    jobs = [slurm.Job("1", 0, "/a b.sbatch", 11, 0), slurm.Job("2", 0, "/a b.sbatch", 11, 8)]
    assert slurm.retries(jobs, [3, 7, 8, 9]) == [
        "sbatch --array=3,7 '/a b.sbatch'",
        "sbatch --array=0-1 '/a b.sbatch' 8",
    ]
    assert slurm.retries([slurm.Job("1", 0, "", 4, 0)], [3]) == ["sbatch --array=3 JOB.sbatch"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["a b", 'a"b', "a'b", "a\\b", "a;b#c", "a=b", "a`b$c"])
def test_sbatch_reads_a_value_as_it_was_typed(value: str, cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "s.sbatch"
    lines = [slurm.Directive("job-name", value).line, slurm.Directive("output", "/dev/null").line]
    script.write_text("\n".join(["#!/bin/bash", *lines, "true"]) + "\n")
    job = cluster.run("sbatch", "--parsable", "--hold", script)
    assert cluster.run("squeue", "-h", "-j", job, "-o", "%j") == value
    cluster.run("scancel", job)


def test_what_is_not_there_is_said_before_the_job_waits_for_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, sentence in (
        (("missing.jsonl",), "there is no file missing.jsonl"),
        (("--model", "no/such"), "batchgen pull"),
    ):
        done = submit(tmp_path, monkeypatch, *RUN, *more)
        assert done.exit_code == 4
        assert sentence in done.output
        assert not list(tmp_path.glob("out*"))
