"""`--adapter`: what the commands say of it, and what a run records."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from batchgen.commands import main
from tests import adapters
from tests.commands.starts import Ended, read_rows, write_rows

SHORT = ("--max-new-tokens", 8, "--no-selftest", "--engine", "accelerate")


def call(folder: Path, *words: object) -> Ended:
    """`batchgen WORDS…` in `folder`, in this process, which has loaded torch already."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(main, [str(word) for word in words])
    return Ended(done.exit_code, done.stdout, done.stderr)


class Folders(NamedTuple):
    """Where things lie."""

    work: Path
    base: Path
    merged: Path
    adapter: Path
    other: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    work = tmp_path_factory.mktemp("commands")
    base = adapters.save_base(work / "base", "llama")
    settings = {"target_modules": ["q_proj", "down_proj"]}
    adapter = adapters.save_adapter(base, work / "sql", settings, merged=work / "merged")
    other = shutil.copytree(adapter, work / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    adapters.save_adapter(adapters.save_base(work / "bloom", "bloom"), work / "foreign", {"target_modules": ["dense"]})
    write_rows(work / "in.jsonl", [{"prompt": "Say a word"}, {"prompt": "And another one"}])
    return Folders(work, base, work / "merged", adapter, other)


@pytest.fixture(scope="module")
def texts(folders: Folders) -> list[str]:
    """What the model says into which peft has merged the adapter."""
    ended = call(folders.work, "run", "in.jsonl", "-o", "expected", "--model", "merged", *SHORT)
    assert ended.code == 0, ended.err
    return [row["text"] for row in read_rows(folders.work / "expected" / "generations.jsonl")]


def test_a_run_generates_as_the_merged_model_and_goes_on_with_this_adapter_alone(
    folders: Folders, texts: list[str]
) -> None:
    words = ("run", "in.jsonl", "-o", "out", "--model", "base", *SHORT)
    ended = call(folders.work, *words, "--adapter", "sql")
    assert ended.code == 0, ended.err
    assert [row["text"] for row in read_rows(folders.work / "out" / "generations.jsonl")] == texts
    content = json.loads((folders.work / "out" / "run.json").read_text())
    assert content["first_start"]["adapter_folder"] == str(folders.adapter)
    assert call(folders.work, *words, "--adapter", folders.adapter).code == 0
    for given, said in (((), "now not set"), (("--adapter", "other"), 'now "sha256:')):
        refused = call(folders.work, *words, *given)
        assert refused.code == 4
        assert 'was asked differently: adapter was "sha256:' in refused.err
        assert said in refused.err
    content["asked"].pop("adapter")  # as a version before has left it
    (folders.work / "out" / "run.json").write_text(json.dumps(content))
    assert call(folders.work, *words).code == 0
    assert 'adapter was not set, now "sha256:' in call(folders.work, *words, "--adapter", "sql").err


def make_lines(*names: str) -> list[dict[str, object]]:
    return [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "Say a word"}}
        for name in names
    ]


@pytest.mark.parametrize(
    "modules",
    [
        ("--lora-modules", "sql=sql", "law=other"),
        ("--lora-modules", '{"name": "sql", "path": "sql", "base_model_name": "x"}', "--lora-modules", "law=other"),
        ("--adapter", "sql=sql", "--adapter", "law=other"),
    ],
)
def test_lora_modules_answer_the_lines_that_name_them(
    folders: Folders, modules: tuple[str, ...], texts: list[str], tmp_path: Path
) -> None:
    write_rows(folders.work / "lines.jsonl", make_lines("base", "sql", "law", "math"))
    flags = ("--enable-lora", "--max-lora-rank", 64, *modules, "--model", "base")
    words = ("run-batch", "-i", "lines.jsonl", "-o", tmp_path / "answers.jsonl", *flags, "--temperature", 0)
    ended = call(folders.work, *words, *SHORT[:-1], "paged")
    assert ended.code == 3, ended.err
    base, sql, law, none = (answer["response"] for answer in read_rows(tmp_path / "answers.jsonl"))
    assert [answer["body"]["model"] for answer in (base, sql, law)] == ["base", "sql", "law"]
    found = [answer["body"]["choices"][0]["text"] for answer in (base, sql, law)]
    assert found[1] == texts[0]
    assert len(set(found)) == 3
    assert none["status_code"] == 404
    error = read_rows(tmp_path / "answers.jsonl")[3]["error"]["error"]["message"]
    assert 'body.model is "math", but this run\'s models are "base", "sql", "law": write one of them' in error


def test_an_adapter_without_a_name_answers_the_lines_of_the_model(folders: Folders, texts: list[str]) -> None:
    write_rows(folders.work / "lines.jsonl", make_lines("base", "sql"))
    for name in ("base", "sql"):
        words = ("run-batch", "-i", "lines.jsonl", "-o", f"merged-{name}.jsonl", "--model", "base", "--temperature", 0)
        ended = call(folders.work, *words, "--adapter", "sql", "--served-model-name", name, *SHORT)
        assert ended.code == 3, ended.err
        for answer in read_rows(folders.work / f"merged-{name}.jsonl"):
            if answer["custom_id"] == name:
                assert answer["response"]["body"]["choices"][0]["text"] == texts[0]
            else:
                assert answer["response"]["status_code"] == 404


def test_a_dry_run_and_a_plan_check_it(folders: Folders) -> None:
    ended = call(folders.work, "run", "in.jsonl", "--dry-run", "--model", "base", "--adapter", "sql", *SHORT)
    assert f"adapter:  {folders.adapter} sha256:" in ended.out, ended.err
    ended = call(folders.work, "plan", "in.jsonl", "--model", "base", "--adapter", "sql")
    assert "--adapter sql" in ended.out.splitlines()[-1], ended.err
    shutil.copytree(folders.adapter, folders.work / "twice", dirs_exist_ok=True)
    config = json.loads((folders.adapter / "adapter_config.json").read_text())
    (folders.work / "twice" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    for words in (
        ("plan", "in.jsonl", "--model", "base"),
        ("run", "in.jsonl", "--dry-run", "--model", "base"),
        ("run", "in.jsonl", "-o", "refused", "--model", "base"),
        ("submit", "--print", "--", "run", "in.jsonl", "--model", "base"),
    ):
        ended = call(folders.work, *words, "--adapter", "twice")
        assert (ended.code, "says rank 8 for model.layers.0.") == (4, "says rank 8 for model.layers.0."), ended.err
        assert "says rank 8 for model.layers.0." in ended.err
    assert not (folders.work / "refused").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "in.jsonl", "--adapter", "sql", "--adapter", "other"), "With NAME=FOLDER, each row may name one of"),
        (("run", "in.jsonl", "--adapter", "a=sql", "--adapter", "a=other"), "the name a is given to sql and to other"),
        (("run", "in.jsonl", "--adapter", "sql", "--adapter", "a=other"), "with a name for each, --adapter NAME=FOLD"),
        (
            ("run-batch", "-i", "in.jsonl", "-o", "o.jsonl", "--model", "base", "--adapter", "base=sql"),
            "an adapter cannot be called 'base', as the model itself is",
        ),
        (
            ("run", "in.jsonl", "--model", "base", "--engine", "accelerate", "--adapter", "a=sql"),
            "--adapter FOLDER, without a name, merges one adapter for all of them, and --engine paged has several",
        ),
        (("run", "in.jsonl", "--engine", "echo", "--adapter", "a=nowhere"), "the adapter nowhere is not there"),
        (("run", "in.jsonl", "--adapter", "=sql"), "'=sql' is neither FOLDER nor NAME=FOLDER"),
        (("run", "in.jsonl", "--engine", "echo", "--adapter", "nowhere"), "the adapter nowhere is not there"),
        (("run", "in.jsonl", "--model", "sql"), "give it as --adapter, and the model that it belongs to as --model"),
    ],
)
def test_what_is_written_wrong_is_one_sentence(words: tuple[str, ...], sentence: str, folders: Folders) -> None:
    ended = call(folders.work, *words)
    assert ended.code in (2, 4)
    assert sentence in ended.err


def test_a_job_has_it(folders: Folders) -> None:
    words = ("submit", "--print", "--", "run", "in.jsonl", "--model", "base", "--adapter", "sql")
    ended = call(folders.work, *words)
    assert ended.code == 0, ended.err
    assert "--adapter sql" in ended.out
    ended = call(folders.work, *words[:-1], "a=sql", "--adapter", "b=other")
    assert ended.code == 0, ended.err
    assert "--adapter a=sql --adapter b=other" in ended.out
    assert "does not fit" in call(folders.work, *words[:-1], "a=sql", "--adapter", "b=foreign").err
