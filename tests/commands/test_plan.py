"""`batchgen plan` takes what `run` takes, and the command that it suggests makes the same texts."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchgen import models
from batchgen.bench.results import ARTICLE_JOB, Folder, Result
from batchgen.commands import main
from batchgen.commands.run import command as run


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n')
    return tmp_path / "p.jsonl"


def suggested(*words: str) -> list[str]:
    """The words behind `batchgen run` of the command that is said to be the fastest."""
    done = CliRunner().invoke(main, ["plan", "p.jsonl", *words])
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1].removeprefix("the fastest that fits: ")
    assert shlex.split(line)[:2] == ["batchgen", "run"]
    return shlex.split(line)[2:]


def test_all_that_decides_the_text_is_in_the_suggested_command(prompts: Path) -> None:
    (prompts.parent / "s.json").write_text('{"type": "object"}')
    asked = ["--stop", "END", "--stop", "-x y", "--seed", "5", "--logprobs", "--temperature", "0.5", "--top-k", "3"]
    asked += ["--samples", "3", "--ignore-eos", "--min-p", "0.25", "--top-logprobs", "2", "--thinking-tokens", "0"]
    given = run.make_context("run", suggested("--model", "llama-8b", *asked)).params
    assert (given["stop"], given["seed"], given["logprobs"]) == (("END", "-x y"), 5, True)
    assert (given["temperature"], given["top_k"], given["top_p"]) == (0.5, 3, 1.0)
    assert (given["n"], given["ignore_eos"], given["min_p"], given["top_logprobs"]) == (3, True, 0.25, 2)
    assert given["thinking_tokens"] == 0
    for words in (["--json-schema", "s.json"], ["--regex", "a b"], ["--choice", "a b", "--choice", "-c"]):
        name = words[0].removeprefix("--").replace("-", "_")
        there = run.make_context("run", suggested("--model", "llama-8b", *words)).params[name]
        assert there == run.make_context("run", ["in.jsonl", *words]).params[name]
    assert not {"--stop", "--seed", "--logprobs"} & set(suggested("--model", "llama-8b"))


def test_a_model_that_can_be_run_is_in_the_suggested_command(prompts: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, "mine")
    for model, said in (("mine", "mine"), ("llama-8b", "MODEL"), ("mine/config.json", "MODEL")):
        assert suggested("--model", model)[1:3] == ["--model", said]


def test_the_default_model_is_found_by_its_name(
    prompts: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache" / "models" / models.DEFAULT
    shutil.copytree(tiny_llama, place)  # as if it had been prepared
    (place / "manifest.json").write_text(json.dumps({"sizes": {}}))
    monkeypatch.setenv("BATCHGEN_CACHE", str(tmp_path / "cache"))
    assert suggested("--model", models.DEFAULT)[1:3] == ["--model", models.DEFAULT]


def plan(*words: str) -> str:
    done = CliRunner().invoke(main, ["plan", "p.jsonl", "--model", "bloom-560m", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_cache_of_8_bits_has_room_for_nearly_twice_the_rows(prompts: Path) -> None:
    rows = []
    for words in ((), ("--kv-dtype", "fp8")):
        done = CliRunner().invoke(main, ["plan", "p.jsonl", "--model", "bloom-7b1", "--max-new-tokens", "900", *words])
        assert done.exit_code == 0, done.output
        lines = [line for line in done.stdout.splitlines() if line.startswith("  paged, 1 rank(s)")]
        rows.append(int(lines[0].partition("batches of up to ")[2].partition(" rows")[0]))
        assert ("  accelerate" in done.stdout) == (not words)
    assert "bytes of KV cache for a token" in done.stdout
    assert "247,680 bytes" in done.stdout
    assert 1.8 < rows[1] / rows[0] < 2
    words = suggested("--model", "llama-8b", "--kv-dtype", "fp8")
    assert words[words.index("--kv-dtype") + 1] == "fp8"
    assert run.make_context("run", words).params["kv_dtype"] == "fp8"


def test_quantised_weights_are_not_planned_to_be_rounded_once_more(prompts: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, prompts.parent / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["plan", "p.jsonl", "--model", str(folder), "--dtype", "int8"])
    assert done.exit_code == 4
    assert "awq are quantised already (awq, by quantization_config" in done.output
    assert "leave --dtype int8 out" in done.output
    config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))  # the cache alone: a run rounds the weights
    done = CliRunner().invoke(main, ["plan", "p.jsonl", "--model", str(folder), "--dtype", "int8"])
    assert done.exit_code == 0, done.output


def test_a_gpu_without_8_bit_floats_is_not_planned_with_them(prompts: Path) -> None:
    for words in (("--dtype", "fp8"), ("--kv-dtype", "fp8")):
        done = CliRunner().invoke(main, ["plan", "p.jsonl", "--model", "llama-8b", "--gpu", "A100-80", *words])
        assert done.exit_code == 4
        assert f"{' '.join(words)} takes a GPU that knows 8-bit floats" in done.output
        assert "(A100-80)" in done.output
    assert plan("--gpu", "A100-80", "--dtype", "int8")
    assert plan("--gpu", "L40S", "--dtype", "fp8", "--kv-dtype", "fp8")


def test_only_steps_of_the_same_cache_are_taken_from_a_bench(prompts: Path) -> None:
    folder = Folder(prompts.parent / "bench")
    folder.check_or_create({"model": "llama-8b", "dtype": "bfloat16"})
    for system, seconds in (("paged", 1.0), ("paged:kv_dtype=fp8", 50.0)):
        folder.add(
            Result(
                system=system, ranks=1, job=ARTICLE_JOB, batch=1, outcome="ok", rows=1, generated=101,
                counted_by_seed=101, seconds=[100 * seconds], prefill_seconds=0.0, streams=1,
            )
        )  # fmt: skip
    speeds = [
        json.loads(
            CliRunner()
            .invoke(main, ["plan", "p.jsonl", "--model", "llama-8b", "--bench", "bench", "--json", *words])
            .stdout
        )["forecasts"]
        for words in ((), ("--kv-dtype", "fp8"))
    ]
    plain, rounded = (next(one for one in of if one["engine"] == "paged" and one["measured"]) for of in speeds)
    assert plain["seconds"] < rounded["seconds"] / 20


def test_memory_is_shown_as_it_was_given_and_a_gpu_that_was_not_named_is_said(prompts: Path) -> None:
    assert "on 1 GPU(s) of 80 GiB\n" in plan("--gpu-memory", "80", "--gpu", "H100")
    for size, name in (("80", "H100"), ("39.5", "A100-40"), ("200", "H200")):
        text = plan("--gpu-memory", size)
        assert f"on 1 GPU(s) of {size} GiB\n" in text
        assert f"no --gpu was given: the speeds are those of the {name}, whose memory is the nearest\n" in text
    assert "no --gpu was given: an H100 is assumed\n" in plan()
    assert "no --gpu was given" not in plan("--gpu", "V100")
