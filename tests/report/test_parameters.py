"""What rows ask for, on the page: constraints, samples, calls of tools, thinking; nothing of it in other runs."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from batchgen.checkpoint import RunFolder
from batchgen.report import write
from batchgen.report.lines import Part, TableRow, read
from batchgen.requests.output import renderer
from batchgen.types import Generation
from tests.byte_tokenizer import request
from tests.checkpoint.folders import batch, commit, died, made
from tests.commands.starts import call, write_rows
from tests.report import folders
from tests.report.test_report import report

LABELS = ("constraints not met", "samples", "calls of tools", "tokens of thinking")


def said(page: str) -> list[str]:
    """The labels of tiles that are on the page."""
    return [label for label in LABELS if f" {label} " in page]


def test_page_counts_constraints_that_were_not_met_and_samples(tmp_path: Path) -> None:
    text = report(folders.with_constraints(tmp_path))
    assert "constraints not met 2 1 row cut by the length before the constraint was met, 1 refused" in text
    assert "samples 20 texts of 1 row " in text
    assert "constraint 1 row 2, refused: line 3 of p.jsonl: json_schema: the schema uses uniqueItems" in text
    assert said(text) == ["constraints not met", "samples"]


def test_page_counts_calls_and_thinking(tmp_path: Path) -> None:
    text = report(folders.with_calls(tmp_path).path)
    assert "calls of tools 3 in 2 rows" in text
    assert "samples 3 texts of 1 row " in text
    assert "tokens of thinking 25 42 % of the tokens generated" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert said(text) == ["samples", "calls of tools", "tokens of thinking"]


def test_page_of_a_part_of_the_rows_says_of_how_many_it_counts(tmp_path: Path) -> None:
    text = report(folders.with_calls(tmp_path).path, rows=3)
    assert re.search(r"calls of tools [123] in [12] rows? of the 3 good rows that were read", text)


def test_page_of_a_constraint_for_all_rows_says_that_all_have_met_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "yes"}])
    assert call(tmp_path, "run", rows, "-o", "out", "--engine", "echo", "--choice", "yes").code == 0
    text = report(tmp_path / "out")
    assert "constraints not met 0 0 rows cut by the length before the constraint was met, 0 refused" in text


def test_lines_for_vllm_that_were_refused_for_their_constraint_are_counted(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"guided_regex": "(?=a)"}, {"guided_choice": []}, {"guided_regex": "a"}]
    lines = [
        request({"prompt": "a", **body}, url="/v1/completions", custom_id=str(number))
        for number, body in enumerate(bodies)
    ]
    words = ["-i", write_rows(tmp_path / "r.jsonl", lines), "-o", "answers.jsonl", "--engine", "echo"]
    assert call(tmp_path, "run-batch", *words).code == 3
    text = report(tmp_path / "answers.jsonl.run")
    assert "constraints not met 1 0 rows cut by the length before the constraint was met, 1 refused" in text
    assert "BadRequestError 1 row 1" in text


def test_folders_from_before_say_nothing_of_it(tmp_path: Path) -> None:
    """Their records have no such figures, and their rows may have columns of these names."""
    folder = made(tmp_path, 3)
    died(folder)
    _, records = commit(folder, 1, 0, batch(range(2)))
    assert b'"reasoning_tokens":0' in records.read_bytes()
    records.write_bytes(without_figures(records.read_bytes()))
    text = report(folder.path)
    assert "rows finished 67" in text
    assert said(text) == []


def without_figures(record: bytes) -> bytes:
    """The record as it was before it had figures of constraints and of thinking, sealed again."""
    values = json.loads(record)
    kept = {name: value for name, value in values.items() if name not in ("incomplete", "reasoning_tokens", "seal")}
    body = json.dumps(kept, separators=(",", ":")).encode()[:-1]
    return b'%b,"seal":%d}\n' % (body, zlib.crc32(body))


def test_row_opens_to_its_thinking_its_calls_and_its_samples(tmp_path: Path, opened: Callable[..., Page]) -> None:
    run = folders.with_calls(tmp_path)
    made = write(RunFolder(run.path), tmp_path / "r.html", tmp_path / "plots", rows=100, text_characters=2000)
    for width in (1400, 390):
        page = opened(made.page, width)
        expect(page.locator("#found")).to_have_text("4 rows")
        glances = page.locator("#rows tr.row td:nth-child(8)").all_inner_texts()
        assert glances == [
            'tool calls: weather({"city": "Bonn"}) weather({"city": "<b>Ulm</b>"})', "Four.", "First.", "Plain."
        ]  # fmt: skip
        page.locator("#rows tr.row button").first.click()
        assert titles(page) == ["prompt", "thinking", "generation", "tool calls"]
        box = page.locator(".texts").bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= width  # the table may be wider, the texts are not
        expect(page.locator(".texts .thinking pre")).to_have_text(f"Perhaps {folders.EVIL}")
        expect(page.locator(".texts .tool pre")).to_have_text(
            'weather({"city": "Bonn"})\nweather({"city": "<b>Ulm</b>"})', use_inner_text=True
        )
        page.fill("#search", "third.")
        expect(page.locator("#found")).to_have_text("1 of 4 rows")
        expect(page.locator("#rows tr.row td:nth-child(8)")).to_have_text("sample 3: Third.")
        page.locator("#rows tr.row button").first.click()
        assert titles(page) == [
            *("prompt", "thinking", "generation", "tool calls", "sample 2", "thinking of sample 3", "sample 3"),
        ]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("img, b[onerror], #rows b").count() == 0
        page.fill("#search", "")
        page.select_option("#filter", "=tool_calls")
        expect(page.locator("#found")).to_have_text("2 of 4 rows")


def titles(page: Page) -> list[str]:
    return page.locator(".texts h3").all_inner_texts()


def test_samples_beyond_those_that_the_page_has_are_counted(tmp_path: Path, opened: Callable[..., Page]) -> None:
    run = folders.with_constraints(tmp_path)
    made = write(RunFolder(run), tmp_path / "r.html", tmp_path / "plots", rows=100, text_characters=2000)
    page = opened(made.page)
    page.locator("#rows tr.row button").last.click()
    assert titles(page)[-3:] == ["sample 16", "further samples", "other columns"]
    expect(page.locator(".texts .further pre")).to_have_text("4, which this page leaves out")


def line(**values: object) -> bytes:
    row = {"id": "a", "index": 0, "text": "t", "finish_reason": "stop", "prompt_tokens": 1, "generated_tokens": 2}
    return json.dumps({**row, "error": None, **values}).encode()


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":\n1}'}}


@pytest.mark.parametrize(
    ("text", "parts", "samples", "calls"),
    [
        (line(), [], 1, 0),
        (line(reasoning="r", tool_calls=[CALL]), [("thinking", "r"), ("tool calls", 'f({"a":\n1})')], 1, 1),
        (line(texts=["t", ""]), [("sample 2", "")], 2, 0),
        (
            line(texts=["t", "u"], texts_tool_calls=[[], [CALL, CALL]]),
            [("sample 2", "u"), ("tool calls of sample 2", 'f({"a":\n1})\nf({"a":\n1})')],
            *(2, 2),
        ),
        # Columns of rows from before, of any type.
        (line(texts="mine", tool_calls="none", reasoning=["x"]), [], 1, 0),
        (line(tool_calls=[{"name": "f"}, 3, {"function": "f"}], texts=[]), [], 1, 0),
    ],
)
def test_parts_of_a_plain_row(text: bytes, parts: list[tuple[str, str]], samples: int, calls: int) -> None:
    row = read(text, None)
    assert (list(row.parts), row.samples, row.calls) == ([Part(*part) for part in parts], samples, calls)


def test_calls_in_a_conversation_are_readable() -> None:
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert read(line(messages=turns), None).prompt == 'user: Rain?\n\nassistant: f({"a":\n1})'


def of_response(reason: Any) -> TableRow:
    body = request({"input": "Hi"}, url="/v1/responses")
    row = renderer("m", 0, "openai", True)(Generation(0, "r", "Hello", reason, 3, 2, None, {}, body))
    return read(row, None)


def test_responses_are_read() -> None:
    row = of_response("stop")
    assert (row.text, row.ending, row.prompt_tokens, row.generated_tokens) == ("Hello", "stop", 3, 2)
    assert of_response("length").ending == "length"
