"""Each command that takes a model ends with 4 and one sentence where the model's folder cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from batchgen.commands import main
from tests.commands.starts import write_rows
from tests.tiny_models import BEGIN, END, PAD

REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}
COMMANDS = {
    "run": ["run", "rows.jsonl", "-o", "out", "--model"],
    "run with an engine": ["run", "rows.jsonl", "-o", "out", "--engine", "accelerate", "--model"],
    "run-batch": ["run-batch", "-i", "requests.jsonl", "-o", "answers.jsonl", "--model"],
    "plan": ["plan", "rows.jsonl", "--model"],
    "bench": ["bench", "-o", "bench", "--model"],
    "split": ["split", "split", "--tp", "2"],
    "submit": ["submit", "--", "run", "rows.jsonl", "-o", "out", "--model"],
}


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "Hello there"}])
    write_rows(tmp_path / "requests.jsonl", [REQUEST])
    return shutil.copytree(tiny_llama, tmp_path / "model")


def call(words: list[str], folder: Path) -> tuple[int, str]:
    """The exit code, and what was said; `split` takes its folder first."""
    words = ["split", str(folder), *words[1:]] if words[0] == "split" else [*words, str(folder)]
    done = CliRunner().invoke(main, words)
    return done.exit_code, done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_that_no_model_can_be_made_of_is_exit_4(command: str, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"pad_token_id": 260}))
    code, said = call(COMMANDS[command], folder)
    assert code == 4, said
    assert said.endswith(
        f"{folder} cannot be used: config.json: pad_token_id is 260, but the model has 260 tokens (0 to 259)\n"
    )
    assert not list(Path().glob("out/*.jsonl"))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "plan"])  # which reads no weights
def test_weights_that_are_none_are_exit_4(command: str, folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, said = call(COMMANDS[command], folder)
    assert code == 4, said
    assert f"Error: {folder / 'model.safetensors'} is a pointer of Git LFS" in said


def test_a_decoder_that_transformers_cannot_generate_with_is_exit_4(folder: Path) -> None:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
    }
    marks = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    config = AutoConfig.for_model("bart", vocab_size=260, is_decoder=True, is_encoder_decoder=False, **sizes, **marks)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    code, said = call(COMMANDS["run with an engine"], folder)
    assert code == 4, said
    assert (
        f"Error: Transformers cannot generate with the model in {folder} (bart): IndexError: list index out of" in said
    )


@pytest.fixture
def packed(folder: Path) -> Path:
    """A folder whose config says that its weights are packed, and they are not."""
    values = json.loads((folder / "config.json").read_text())
    packing = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": packing}))
    return folder


@pytest.mark.parametrize("engine", ["accelerate", "paged"])
def test_weights_that_are_not_packed_as_the_config_says_are_exit_4(engine: str, packed: Path) -> None:
    """bitsandbytes finds it in the first forward, by an assertion without a word."""
    code, said = call(["run", "rows.jsonl", "-o", "out", "--engine", engine, "--model"], packed)
    assert code == 4, said
    assert f"Error: Transformers cannot generate with the model in {packed} (llama): AssertionError" in said
    assert "Traceback" not in said


def test_packed_weights_are_not_sharded(packed: Path) -> None:
    code, said = call(["run", "rows.jsonl", "-o", "out", "--engine", "ds-zero", "--model"], packed)
    assert code == 4, said
    assert "Error: the weights of this model are packed (quantization_config in config.json), and Transformers" in said
    assert "Traceback" not in said
