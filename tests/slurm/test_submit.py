"""What `batchgen submit` hands to sbatch, and what it leaves beside the run folder."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests.commands.starts import call, write_rows
from tests.slurm.fakes import have
from tests.slurm.test_script import RUN, directives, submit

# Keeps the words of each call, a line a call, which is the number of the job too.
SBATCH = (
    'echo "$@" >> "$0.said"; number=0; while read -r line; do number=$((number + 1)); done < "$0.said"; echo $number'
)


def handed(folder: Path) -> list[list[str]]:
    """The words of each call of sbatch, without --parsable and the script."""
    lines = (folder / "sbatch.said").read_text().splitlines()
    return [[word for word in shlex.split(line)[1:] if not word.endswith(".sbatch")] for line in lines]


def test_of_several_arrays_as_many_tasks_run_at_once_as_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = have(tmp_path, monkeypatch, sbatch=SBATCH, scontrol="echo 'MaxArraySize            = 5'")
    after = "--kill-on-invalid-dep=yes"
    assert submit(tmp_path, monkeypatch, "--array", "12%2", *RUN).stdout.split() == ["1", "2", "3"]
    assert handed(commands) == [
        ["--array=0-4%2"],
        ["--array=0-4%2", "--dependency=afterany:1", after, "5"],
        ["--array=0-1%2", "--dependency=afterany:2", after, "10"],
    ]
    (commands / "sbatch.said").unlink()
    submit(tmp_path, monkeypatch, "--array", "12", *RUN)
    assert handed(commands) == [["--array=0-4"], ["--array=0-4", "5"], ["--array=0-1", "10"]]
    (commands / "sbatch.said").unlink()
    submit(tmp_path, monkeypatch, "--array", "7%2", "--chain", "2", *RUN)
    assert [words[1] for words in handed(commands)[1:]] == [f"--dependency=afterany:{job}" for job in (1, 2, 3)]


def test_the_shard_of_an_array_is_an_option_whatever_the_command_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--print", "--array", "4", "--", "run", "-o", "out", "--engine", "echo", "--", "p.jsonl"]
    text = submit(tmp_path, monkeypatch, *words).stdout
    assert 'batchgen run --shard "$((SLURM_ARRAY_TASK_ID + ${1:-0}))/4" -o out --engine echo -- p.jsonl\n' in text


def test_every_script_that_was_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(tmp_path, monkeypatch, sbatch=SBATCH)
    script = tmp_path / "out.sbatch"
    for number in range(3):
        script.write_bytes(b"edited \xff %d\n" % number)
        done = submit(tmp_path, monkeypatch, *RUN)
        assert done.exit_code == 0, done.output
    kept = [tmp_path / f"out.sbatch.old{number}" for number in ("", 2, 3)]
    assert [path.read_bytes() for path in kept] == [b"edited \xff 0\n", b"edited \xff 1\n", b"edited \xff 2\n"]
    assert "the script that was there is now out.sbatch.old3" in done.stderr
    assert "now" not in submit(tmp_path, monkeypatch, *RUN).stderr


def test_a_working_folder_may_have_a_name_that_is_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "f") + b"\xff"))
    folder.mkdir()
    have(tmp_path, monkeypatch, sbatch=SBATCH)
    line = b'#SBATCH --chdir="' + os.fsencode(folder) + b'"\n'
    printed = submit(folder, monkeypatch, "--print", *RUN)
    assert line in printed.stdout_bytes, printed.output
    done = submit(folder, monkeypatch, *RUN)
    assert (done.exit_code, done.stdout) == (0, "1\n"), done.output
    assert line in (folder / "out.sbatch").read_bytes()


@pytest.mark.parametrize("signal", ["TERM@300", "B:TERM@300", "INT", "15@60", "R:HUP@60", "KILL", "B:"])
def test_a_signal_that_would_not_bring_the_job_back_is_refused(
    signal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = f"--signal={signal} cannot be used here: a job takes only USR1, USR2 and XCPU"
    typed = submit(tmp_path, monkeypatch, "--print", f"--signal={signal}", *RUN)
    assert (typed.exit_code, sentence in typed.output) == (4, True), typed.output
    (tmp_path / "slurm.toml").write_text(f'[sbatch]\nsignal = "{signal}"\n')
    of_site = submit(tmp_path, monkeypatch, "--print", *RUN)
    assert (of_site.exit_code, f"{tmp_path / 'slurm.toml'}: {sentence}" in of_site.output) == (4, True), of_site.output


@pytest.mark.parametrize(
    ("signal", "written"),
    [("USR1", "B:USR1"), ("R:USR2@9", "RB:USR2@9"), ("br:sigxcpu@9", "RB:sigxcpu@9"), ("B:12@9", "B:12@9")],
)
def test_the_batch_process_is_warned_however_the_signal_is_written(
    signal: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"--signal={written}" in directives(
        submit(tmp_path, monkeypatch, "--print", "--signal", signal, *RUN).stdout
    )
    (tmp_path / "slurm.toml").write_text(f'[sbatch]\nsignal = "{signal}"\n')
    assert f"--signal={written}" in directives(submit(tmp_path, monkeypatch, "--print", *RUN).stdout)


def test_what_a_site_says_of_requeueing_is_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm.toml").write_text("[sbatch]\nno-requeue = true\nmem = 0\n")
    text = submit(tmp_path, monkeypatch, "--print", *RUN).stdout
    assert "job --max-requeues=0 --" in text
    assert [line for line in directives(text) if "requeue" in line] == ["--no-requeue"]
    text = submit(tmp_path, monkeypatch, "--print", "--requeue", *RUN).stdout
    assert "job --max-requeues=100 --" in text
    assert [line for line in directives(text) if "requeue" in line] == ["--requeue"]
    # Of the user, and off in this folder.
    (tmp_path / "config" / "batchgen").mkdir(parents=True)
    (tmp_path / "slurm.toml").rename(tmp_path / "config" / "batchgen" / "slurm.toml")
    (tmp_path / "slurm.toml").write_text("[sbatch]\nno-requeue = false\n")
    text = submit(tmp_path, monkeypatch, "--print", *RUN).stdout
    assert "job --max-requeues=100 --" in text
    assert {"--requeue", "--mem=0"} <= set(directives(text))
    (tmp_path / "slurm.toml").write_text('[sbatch]\narray = "0-3"\n')
    refused = submit(tmp_path, monkeypatch, "--print", *RUN)
    assert f"{tmp_path / 'slurm.toml'}: sbatch's own --array cannot be used here" in refused.output


@pytest.mark.slow
def test_a_batch_may_be_at_an_address_and_its_model_of_another_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    cached, commit = tmp_path / "hub" / "models--org--x", "c" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text(commit)
    shutil.copytree(tiny_llama, cached / "snapshots" / commit)
    commands = have(tmp_path, monkeypatch, sbatch=SBATCH)
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": str(commands), "HOME": str(tmp_path)}
    write_rows(tmp_path / "in.jsonl", [])
    for source, revision, code in (("https://host/in.jsonl", "v1", 0), ("in.jsonl", "v1", 0), ("in.jsonl", "v2", 4)):
        words = ["run-batch", "-i", source, "-o", "out.jsonl", "--model", "org/x", "--revision", revision]
        done = call(tmp_path, "submit", "--", *words, environment=environment)
        assert done.code == code, done.err
    assert "batchgen pull org/x@v2" in done.err
