"""What people write behind a flag, and the value that is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.commands import main
from batchgen.commands._values import escape, unescape
from batchgen.commands.run import command


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
