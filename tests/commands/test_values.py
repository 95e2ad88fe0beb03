"""What people write behind a flag, and the value that is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.commands import main
from batchgen.commands._sampling import read_sampling
from batchgen.commands._values import escape, unescape
from batchgen.commands.run import command
from batchgen.types import Constraint, SamplingParams


def sampling(*words: str) -> SamplingParams:
    """What the sampling options mean."""
    with command.make_context("run", ["in.jsonl", *words], **main.context_settings) as context:
        return read_sampling(dict(context.params))[0]


def read(*words: str) -> dict[str, Any]:
    return command.make_context("run", ["in.jsonl", *words], **main.context_settings).params


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n", "\n"),
        (r"\n\nQ:", "\n\nQ:"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\u00e9\u0041", "éA"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\boxed{", r"\boxed{"),
        (r"\end{x}\u12", r"\end{x}\u12"),
        ("\\", "\\"),
        ("\n", "\n"),
        ("</s>é", "</s>é"),
    ],
)
def test_escapes_of_a_stop_text_are_read(written: str, meant: str) -> None:
    assert read("--stop", written)["stop"] == (meant,)


@given(st.text())
def test_what_is_escaped_is_read_back(text: str) -> None:
    assert unescape(escape(text)) == text


def test_a_stop_text_that_may_be_meant_otherwise_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    read("--stop", r"\text", "--stop", r"\n", "--stop", r"\\text", "--stop", r"\nUser:")
    assert capsys.readouterr().err == (
        'batchgen: --stop \\text is read as "\\text"; a backslash of its own is written \\\\\n'
    )


@pytest.mark.parametrize("content", ["Say: {{ x }}".encode("utf-8-sig"), b"Say: {{ x }}"])
def test_a_template_file_may_begin_with_a_byte_order_mark(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(content)
    assert read("--template", f"@{tmp_path}/t.jinja")["template"] == "Say: {{ x }}"


def test_a_template_file_in_utf_16_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes("Say: {{ x }}".encode("utf-16"))
    with pytest.raises(click.BadParameter, match=r"t\.jinja is not UTF-8 .*iconv -f UTF-16 -t UTF-8"):
        read("--template", f"@{tmp_path}/t.jinja")


@pytest.mark.parametrize(
    "words",
    [
        ("--max-new-tokens", "many"),
        ("--max-new-tokens", "1.5"),
        ("--chat-template-kwargs", "[1]"),
        ("--chat-template-kwargs", "{"),
        ("--chat-template-kwargs", "[" * 100_000),
        ("--id-prefix", "row"),
        ("--template", "@nowhere"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(words: tuple[str, str]) -> None:
    with pytest.raises(click.UsageError):
        read(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], SamplingParams()),
        (["--samples", "4", "--temperature", "1"], SamplingParams(n=4, temperature=1.0)),
        (["--top-logprobs", "3"], SamplingParams(logprobs=True, top_logprobs=3)),
        (["--prompt-logprobs", "0", "--return-token-ids"], SamplingParams(prompt_logprobs=0, return_token_ids=True)),
        (["--min-p", "0.1", "--min-tokens", "5"], SamplingParams(min_p=0.1, min_tokens=5)),
        (
            ["--repetition-penalty", "1.1", "--presence-penalty", "-1", "--frequency-penalty", "2"],
            SamplingParams(repetition_penalty=1.1, presence_penalty=-1.0, frequency_penalty=2.0),
        ),
        (["--ignore-eos", "--thinking-tokens", "0"], SamplingParams(ignore_eos=True, thinking_tokens=0)),
        (["--regex", "[a-c]+"], SamplingParams(constraint=Constraint("regex", "[a-c]+"))),
        (["--choice", "yes", "--choice", "é"], SamplingParams(constraint=Constraint("choice", '["yes", "é"]'))),
        (["--json-schema", "s.json"], SamplingParams(constraint=Constraint("json_schema", '{"type": "object"}\n'))),
        (["--grammar", "g.lark"], SamplingParams(constraint=Constraint("grammar", 'start: "a"\n'))),
    ],
)
def test_options_of_sampling_are_its_parameters(
    words: list[str], expected: SamplingParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text('\ufeff{"type": "object"}\n', encoding="utf-8")
    (tmp_path / "g.lark").write_text('start: "a"\n')
    assert sampling(*words) == expected
