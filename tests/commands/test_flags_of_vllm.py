"""Flags of `vllm run-batch`, in each of its spellings: carried out, ignored and named, or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from batchgen.commands import CommandError, main, run_batch
from batchgen.commands._quantization import choose_dtype
from batchgen.commands._vllm_flag_names import IGNORED, INSTEAD
from tests.commands.starts import call, read_rows, write_rows

FILES = ["-i", "in", "-o", "out"]


def read(*words: str) -> click.Context:
    """What the command makes of its words, and in `args` the flags that it ignores."""
    return run_batch.command.make_context("run-batch", list(words), **main.context_settings)


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["-iin", "-oout", "-cc.mode=3"], ["-cc.mode"]),
        (["-O3", "-i", "in", "-O.mode=3", "-o", "out"], ["-O3", "-O.mode"]),
        (["-i", "in", "-tp", "4", "-cc.pass_config", "5", "-o", "out"], ["-tp", "-cc.pass_config"]),
        (["-i", "in", "-O", "3", "-o", "out"], ["-O"]),
        (["--input_file", "in", "--output_file=out", "--max_model_len=5"], ["--max_model_len"]),
        ([*FILES, "--no-enable-eplb", "--no-enable_lora"], ["--no-enable-eplb", "--no-enable_lora"]),
        ([*FILES, "--cudagraph-capture-sizes", "1", "2", "4", "--seed", "3"], ["--cudagraph-capture-sizes"]),
        ([*FILES, "--eplb-config.a", "b", "--hf-token", "secret"], ["--eplb-config.a", "--hf-token"]),
        ([*FILES, "--quantization=None", "--kv_cache_dtype", "auto"], ["--kv_cache_dtype"]),
        ([*FILES, "--load-format", "safetensors", "--task", "generate"], ["--load-format", "--task"]),
        ([*FILES, "--tokenizer", "a/b", "--model", "a/b"], ["--tokenizer"]),
        ([*FILES, "--no-enable-reasoning"], ["--no-enable-reasoning"]),
        (
            [*FILES, "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": false}'],
            ["--structured-outputs-config"],
        ),
        ([*FILES, "--structured-outputs-config.backend=guidance"], ["--structured-outputs-config.backend"]),
        ([*FILES, "--guided-decoding-backend", "outlines"], ["--guided-decoding-backend"]),
        ([*FILES, "--guided-decoding-backend=xgrammar:no-fallback"], ["--guided-decoding-backend"]),
        (
            [*FILES, "--reasoning-config", '{"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}'],
            ["--reasoning-config"],
        ),
        (
            [*FILES, "--reasoning-config.think-end-str", "[/THINK]", "--reasoning-config.reasoning_parser=qwen3"],
            ["--reasoning-config.think-end-str", "--reasoning-config.reasoning_parser"],
        ),
        ([*FILES, "--enable-auto-tool-choice", "--no-enable-auto-tool-choice"], [
            "--enable-auto-tool-choice", "--no-enable-auto-tool-choice",
        ]),
        ([*FILES, "--exclude-tools-when-tool-choice-none"], ["--exclude-tools-when-tool-choice-none"]),
        ([*FILES, "--no-trust-request-chat-template"], ["--no-trust-request-chat-template"]),
        ([*FILES, "--max-logprobs", "-1", "--tool-strict-level", "0"], ["--max-logprobs", "--tool-strict-level"]),
        ([*FILES, "--no-return-tokens-as-token-ids"], ["--no-return-tokens-as-token-ids"]),
    ],
)  # fmt: skip
def test_what_changes_no_answer_is_ignored_and_named(words: list[str], ignored: list[str]) -> None:
    context = read(*words)
    assert (context.params["input_file"], context.params["output_file"]) == ("in", "out")
    assert context.args == ignored


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--served_model_name", "m"], "served_model_name", "m"),
        (["--max_num_seqs=8"], "max_num_seqs", 8),
        (["--kv-cache-dtype", "fp8"], "kv_dtype", "fp8"),
        (["--kv_cache_dtype=fp8_e4m3"], "kv_dtype", "fp8"),
        (["--kv-dtype", "fp8"], "kv_dtype", "fp8"),
        (["--default-chat-template-kwargs", '{"a": 1}'], "chat_template_kwargs", {"a": 1}),
        (["--default_chat_template_kwargs.a_b", "false"], "chat_template_kwargs", {"a_b": False}),
        (
            ["--default-chat-template-kwargs.a.b=x", "--default-chat-template-kwargs.a.c", "[1]"],
            "chat_template_kwargs",
            {"a": {"b": "x", "c": [1]}},
        ),
        (["--chat-template-kwargs", '{"a": 1}'], "chat_template_kwargs", {"a": 1}),
        (["--reasoning-parser", "deepseek_r1"], "reasoning_parser", "deepseek_r1"),
        (["--tool_call_parser", "llama3_json"], "tool_parser", "llama3_json"),
        (["--trust-request-chat-template"], "trusts_templates", True),
        (["--samples", "3"], "n", 3),
        (["--top_logprobs=5"], "top_logprobs", 5),
        (["--choice", "a", "--choice", "b"], "choice", ("a", "b")),
        (["--no_selftest"], "selftest", False),
        (["--seed", "-12"], "seed", -12),
        (["--stop", "-O3"], "stop", ("-O3",)),
        (["--stop", "--chat-template"], "stop", ("--chat-template",)),
    ],
)
def test_what_is_ours_is_carried_out(words: list[str], name: str, value: Any) -> None:
    context = read(*FILES, *words)
    assert (context.params[name], context.args) == (value, [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--chat_template", "x.jinja"], "has no --chat_template, which would change the answers: the template is the"),
        (["--chat-template=x"], "chat_template.jinja"),
        (["--override-generation-config", '{"temperature": 0.9}'], "give --temperature, --top-p, --top-k"),
        (["--override-generation-config.temperature", "0.9"], "no --override-generation-config.temperature, which"),
        (["--override_generation_config.top_p=0.9"], "no --override_generation_config.top_p, which"),
        (["--quantization-config", "{}"], "--dtype fp8, int8 or int4 makes them smaller"),
        (["--kv-cache-dtype", "fp8_e5m2"], "in the dtype of the model, or in fp8 (e4m3)"),
        (["--kv-cache-dtype=int8"], "in the dtype of the model, or in fp8 (e4m3)"),
        (["--lora-modules", "a"], "--lora-modules a: must be NAME=FOLDER"),
        (["--lora-modules", '{"name": "a"}'], "must be NAME=FOLDER, or"),
        (["--prompt-adapters", "a=b"], "Merge another kind into a copy of the model"),
        (["--tokenizer", "other"], "the tokenizer is the model's"),
        (["--tokenizer-mode", "mistral"], "the tokenizer is the model's"),
        (["--hf-overrides.rope_theta", "1"], "Change config.json"),
        (["--load-format", "dummy"], "as the model's folder has them"),
        (["--structured-outputs-config.disable_any_whitespace", "true"], "structured_outputs"),
        (["--structured-outputs-config", '{"disable_any_whitespace": true}'], "whatever the backend"),
        (["--structured-outputs-config", "xgrammar"], "set line by line"),
        (["--guided-decoding-disable-any-whitespace"], "disable_any_whitespace and"),
        (["--structured-outputs-config.enable_in_reasoning=True"], "begins behind the thinking"),
        (["--structured-outputs-config", "[1]"], "set line by line"),
        (["--guided-decoding-backend", "xgrammar:disable-any-whitespace"], "disable_any_whitespace and"),
        (["--reasoning-config", '{"reasoning_end_str": "I must answer now.</think>"}'], "the model's own mark, and no"),
        (["--reasoning-config.enable_thinking_limit", "1"], "--reasoning-parser names the marks"),
        (["--reasoning-config", "<think>"], "the model's own mark"),
        (["--tool-strict-level", "2"], "tool_choice required, or a"),
        (["--no-exclude-tools-when-tool-choice-none"], "not told of the tools of a line"),
        (["--logits-processors", "a:B"], "code for logits is not loaded"),
        (["--return-tokens-as-token-ids"], "--return-token-ids, gives their ids"),
        (["--config", "flags.yaml"], "write the flags that are in that file"),
        (["--runner", "pooling"], "batchgen answers chats and completions"),
        (["--template", "x"], "run-batch has no --template; `batchgen run` has"),
        (["--served-model-nam", "x"], "is --served-model-name meant?"),
        (["--tensor-parallel-sise", "2"], "is --tensor-parallel-size meant?"),
        (["--frobnicate"], "run-batch has no --frobnicate, and it is no flag of vLLM's that is known here"),
        (["-zz", "1"], "run-batch has no -zz"),
    ],
)
def test_what_would_change_the_answers_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(CommandError) as caught:
        read(*FILES, *words)
    assert caught.value.exit_code == 4
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("method", "of_files", "dtype"),
    [
        (None, None, "half"),
        ("None", "awq", "half"),
        ("fp8", None, "fp8"),
        ("ptpc_fp8", None, "fp8"),
        ("fp8", "fp8", "half"),
        ("awq_marlin", "awq", "half"),
        ("GPTQ", "gptq", "half"),
        ("compressed-tensors", "compressed-tensors", "half"),
        ("awq", None, "files are not quantised. Give a model of that format, or --dtype int4"),
        ("fp8", "awq", "files are of format awq"),
        ("ptpc_fp8", "fp8", "files are of format fp8"),
        ("bitsandbytes", None, "is not known here: --dtype fp8, int8 or int4"),
    ],
)
def test_quantization_is_a_dtype_or_what_the_files_are(
    method: str | None, of_files: str | None, dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    if of_files:
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": of_files}}))
    if " " not in dtype:
        assert choose_dtype(method, "half", str(folder)) == dtype
        return
    with pytest.raises(CommandError, match=re.escape(dtype)):
        choose_dtype(method, "half", str(folder))


def test_every_flag_has_one_verdict() -> None:
    own = {name for one in run_batch.command.params for name in one.opts}
    assert not IGNORED & INSTEAD.keys()
    assert not own & (IGNORED | INSTEAD.keys())


def test_a_word_that_belongs_to_no_flag_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        read("stray", *FILES)


def test_answers_go_where_they_shall(tmp_path: Path) -> None:
    body = {"prompt": "x", "model": "m"}
    write_rows(tmp_path / "in.jsonl", [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}])
    words = ["-i", "in.jsonl", "-o", "out.jsonl", "-cc.mode=3", "-O3", "--model", "m", "--engine", "echo"]
    ended = call(tmp_path, "run-batch", *words)
    assert (ended.code, ended.out) == (0, "out.jsonl\n"), ended.err
    assert "batchgen: ignored, since no answer depends on them here: -cc.mode, -O3\n" in ended.err
    assert [line["custom_id"] for line in read_rows(tmp_path / "out.jsonl")] == ["a"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl", "out.jsonl.run"]
