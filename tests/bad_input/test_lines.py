"""Bad lines of JSON: each is an error row that names file and line, and the rows around it are generated."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.bad_input.command import answered, call

BEFORE = b'{"id":"before","prompt":"one"}\n'
AFTER = b'{"id":"after","prompt":"two"}\n'

# A line, the type of the error, and what the sentence says behind "line 2 of FILE".
BAD: list[tuple[bytes, str, str]] = [
    (b"\0\0\0\0", "malformed_json", " is not valid JSON: Expecting value at column 1"),
    (b'{"prompt":"a\0b"}', "malformed_json", " is not valid JSON: Invalid control character at column 13"),
    (b'{"prompt":"cut', "malformed_json", " is not valid JSON: Unterminated string"),
    (b'{"prompt":"a"} {"prompt":"b"}', "malformed_json", " is not valid JSON: Extra data at column 16"),
    (b'{"prompt":"a"}\r{"prompt":"b"}', "malformed_json", "lines must end in LF or CRLF, not in CR alone"),
    (b"{'prompt':'a'}", "malformed_json", " is not valid JSON: Expecting property name"),
    (b'{"prompt":"\xff"}', "malformed_json", " is not UTF-8: byte 12 is 0xff"),
    (b'{"prompt":"\xed\xa0\x80"}', "malformed_json", " is not UTF-8: byte 12 is 0xed"),
    ('{"prompt":"a"}'.encode("utf-16-le"), "malformed_json", " is not valid JSON: "),
    (b'{"prompt":"\\ud800"}', "malformed_json", " has \\ud800 in a text: half of a surrogate pair"),
    (b'{"prompt":"a","prompt":"b"}', "malformed_json", 'an object has the key "prompt" twice, and only one can be'),
    (b'{"prompt":"a","x":[{"k":1,"k":1}]}', "malformed_json", 'an object has the key "k" twice'),
    (b'{"prompt":"a","x":NaN}', "malformed_json", " is not valid JSON: NaN is not JSON"),
    (b'{"prompt":"a","x":-Infinity}', "malformed_json", " is not valid JSON: -Infinity is not JSON"),
    (b'{"prompt":"a","x":1e999}', "malformed_json", " is not valid JSON: the number 1e999 is too large"),
    (b'{"prompt":"a","x":1' + b"0" * 5000 + b"}", "malformed_json", ": a number of 5001 digits is too long"),
    (b'{"prompt":"a","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "malformed_json", " more than 200 levels deep"),
    (b"[" * 10_000, "malformed_json", " has lists or objects more than 200 levels deep"),
    (b'[{"prompt":"a"}]', "wrong_type", " holds a list, not an object"),
    (b'"a text"', "wrong_type", " holds a text, not an object"),
    (b"12", "wrong_type", " holds a number, not an object"),
    (b"null", "wrong_type", " holds null, not an object"),
    (b"true", "wrong_type", " holds true or false, not an object"),
    (b"{}", "missing_prompt", ': there is no column "prompt" or "messages"; its columns are none. Give it one of them'),
    (
        b'{"text":"a","n":1}',
        "missing_prompt",
        '"prompt" or "messages"; its columns are text, n. Give it one of them, or',
    ),
    (b'{"a\\nb":1}', "missing_prompt", 'its columns are "a\\nb". Give'),
    (b'{"prompt":null}', "missing_prompt", ': the "prompt" column is null; give this row a text'),
    (b'{"messages":null}', "missing_prompt", ': the "messages" column is null; give this row messages'),
    (b'{"prompt":""}', "empty_prompt", ": the prompt is empty: it has no tokens"),
    (b'{"prompt":["a"]}', "wrong_type", ': the "prompt" column must hold a text, not a list'),
    (b'{"prompt":{"a":1}}', "wrong_type", ': the "prompt" column must hold a text, not an object'),
    (b'{"prompt":1}', "wrong_type", ': the "prompt" column must hold a text, not 1'),
    (b'{"prompt":true}', "wrong_type", ': the "prompt" column must hold a text, not true'),
    (b'{"messages":"Hi"}', "wrong_type", ': messages must be a list of messages, not "Hi"'),
    (b'{"messages":[]}', "wrong_type", ": messages must be a list of messages, not an empty list"),
    (b'{"messages":[1]}', "wrong_type", ": messages[0] must be an object with role and content, not 1"),
    (b'{"messages":[{"content":"a"}]}', "wrong_type", ": messages[0]: role must be a text, not null"),
    (b'{"messages":[{"role":"user"}]}', "wrong_type", ": messages[0]: content must be a text or a list of text parts"),
    (
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}',
        "wrong_type",
        ': messages[0]: content may hold parts of type "text" only, not "image_url"',
    ),
    (
        b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"tokenize":true}}',
        "unknown_parameter",
        ': chat_template_kwargs may not set "tokenize": it is no variable of a chat template',
    ),
]


def _zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "b.jsonl.gz": lambda content: gzip.compress(content, mtime=0),
    "c.ndjson.zst": _zstd,
}


@pytest.mark.parametrize("name", PACKED)
def test_bad_lines_are_error_rows_between_good_ones(name: str, tmp_path: Path) -> None:
    lines = [BEFORE, *(line + b"\n" for line, _, _ in BAD), AFTER]
    (tmp_path / name).write_bytes(PACKED[name](b"".join(lines)))
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (3, "out/generations.jsonl\n"), ended.err
    assert f"finished; 2 of {len(lines)} rows good, {len(BAD)} failed, 0 open" in ended.err
    assert "what failed is in out/errors.jsonl" in ended.err
    first, *bad, last = answered(tmp_path / "out")
    assert [(row["id"], row["text"]) for row in (first, last)] == [("before", "one"), ("after", "two")]
    for number, (row, (line, kind, sentence)) in enumerate(zip(bad, BAD, strict=True), 2):
        error = row["error"]
        assert (error["type"], error["line"]) == (kind, number), (line, error)
        assert error["message"].startswith(f"line {number} of {name}"), error
        assert sentence in error["message"], error
        assert len(error["message"]) < 500
        assert (row["id"], row["text"]) == (f"{name}:{number}", None)


# What looks strange and is good: the line, and the text that comes out.
GOOD: list[tuple[bytes, str]] = [
    (b"\xef\xbb\xbf" + b'{"prompt":"a mark"}', "a mark"),  # files put together, each with its byte order mark
    (b'{"prompt":"carriage return"}\r', "carriage return"),
    (b' \t{ "prompt" : "spaces" } ', "spaces"),
    ('{"prompt":"one\u2028line\u0085"}'.encode(), "one\u2028line\u0085"),
    (b'{"prompt":"escaped \\u0000 and \\ud83d\\ude42"}', "escaped \0 and \U0001f642"),
    (b'{"prompt":" \\n\\t "}', " \n\t "),
    (b'{"prompt":"minus zero","zero":-0.0,"big":123456789012345678901234567890}', "minus zero"),
    ('{"prompt":"ﷺ e\u0301 \ufeff"}'.encode(), "ﷺ e\u0301 \ufeff"),
    (b'{"prompt":"{{ 1 // 0 }} %s {}"}', "{{ 1 // 0 }} %s {}"),
    (b'{"messages":[{"role":"assistant","tool_calls":[{"id":1}]}]}', "assistant: \n"),
    (b'{"messages":[{"role":"nobody","content":[{"type":"text","text":"a"}]}]}', "nobody: a\n"),
]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_strange_lines_that_are_good(name: str, mark: bytes, tmp_path: Path) -> None:
    lines = [mark + BEFORE, b"\n", b" \r\n", *(line + b"\n" for line, _ in GOOD), AFTER.rstrip()]
    (tmp_path / name).write_bytes(PACKED[name](b"".join(lines)))
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert ended.code == 0, ended.err
    rows = answered(tmp_path / "out")
    assert [row["text"] for row in rows] == ["one", *(text for _, text in GOOD), "two"]
    assert [row["id"] for row in rows[1:-1]] == [f"{name}:{number}" for number in range(4, len(GOOD) + 4)]
    assert json.dumps(rows[7]["zero"]) == "-0.0"
    assert rows[7]["big"] == 123456789012345678901234567890


def test_crlf_is_no_part_of_a_row(tmp_path: Path) -> None:
    for name, end in (("unix.jsonl", b"\n"), ("windows.jsonl", b"\r\n")):
        (tmp_path / name).write_bytes((BEFORE + AFTER).replace(b"\n", end))
        assert call(tmp_path, "run", name, "-o", name[:4], "--engine", "echo").code == 0
    assert answered(tmp_path / "unix") == answered(tmp_path / "wind")


def test_strict_names_bad_lines_and_generates_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BEFORE + b'{"prompt":NaN}\n{"prompt":1}\n')
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo", "--strict")
    assert ended.code == 4
    assert "2 of 3 rows are bad, and --strict was given; nothing was generated" in ended.err
    assert "line 2 of a.jsonl is not valid JSON: NaN is not JSON" in ended.err
    assert 'line 3 of a.jsonl: the "prompt" column must hold a text, not 1' in ended.err
    assert not list((tmp_path / "out").glob("generations*"))


def _ids(*ids: Any) -> bytes:
    return b"".join(json.dumps({"id": id, "prompt": "p"}).encode() + b"\n" for id in ids)


def test_ids_that_look_alike_are_different_and_no_id_is_a_path(tmp_path: Path) -> None:
    ids = ["a", "A", "é", "e\u0301", " a", "a\nb", "a\0", "../../etc/passwd", "/", "con", "x" * 1_000_000, 10**30, -1]
    (tmp_path / "a.jsonl").write_bytes(_ids(*ids))
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    assert ended.code == 0, ended.err
    assert [row["id"] for row in answered(tmp_path / "out")] == [str(id) for id in ids]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize(
    ("content", "first", "line"),
    [
        (_ids("1", 1), 1, 2),
        (_ids("a", "b", "a"), 1, 3),
        (b'{"id":"a","prompt":"p"}\n{"custom_id":"a","prompt":"p"}\n', 1, 2),
        (b'{"id":"a","prompt":"p"}\n{"\\u0069d":"a","prompt":"p"}\n', 1, 2),  # an escape in the key
        (b'{"id":"a","prompt":"p"}\n{"id":"\\u0061","prompt":"p"}\n', 1, 2),  # and in the id
        (b'{"id":"a.jsonl:2","prompt":"p"}\n{"prompt":"p"}\n', 1, 2),  # the name of a row that has none
        (b'{"prompt":"p"}\n{"id":"a.jsonl:1","prompt":"p"}\n', 1, 2),
    ],
)
def test_an_id_that_is_taken_is_an_error_row(content: bytes, first: int, line: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo").code == 3
    rows = answered(tmp_path / "out")
    assert [row["index"] for row in rows if row["error"] is not None] == [line - 1]
    message = rows[line - 1]["error"]["message"]
    assert message.startswith(f"line {line} of a.jsonl: the id ")
    assert message.endswith(f" is that of line {first} of a.jsonl")


@pytest.mark.parametrize("bad", ["", True, 1.5, [], ["a"], {}])
def test_an_id_of_another_type_is_an_error_row(bad: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_ids("before", bad, "after"))
    assert call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo").code == 3
    rows = answered(tmp_path / "out")
    assert [row["id"] for row in rows] == ["before", "a.jsonl:2", "after"]
    sentence = "line 2 of a.jsonl: id must be a text that is not empty or a whole number, not "
    assert rows[1]["error"]["message"].startswith(sentence)
