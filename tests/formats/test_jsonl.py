"""JSON Lines: what is a row, what is an error row, and compressed files."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.formats import InputError
from batchgen.formats._json_files import other_kind, packing_of
from batchgen.formats._json_lines import DEEPEST
from batchgen.formats.input import Input
from batchgen.formats.jsonl import WINDOW
from batchgen.requests.row_ids import row_id
from batchgen.types import RowError

Read = list[tuple[int, object]]  # line, and columns or the type of the error


def read(content: bytes, folder: Path, name: str = "a.jsonl") -> Read:
    """The rows of a file, read by the process that scanned it and by one that did not, which must agree."""
    path = folder / name
    path.write_bytes(content)
    scanned, taken = (
        [
            (row.line, row.value.type if isinstance(row.value, RowError) else row.value)
            for row in source.rows(range(len(source)))
        ]
        for source in (Input.open([str(path)], folder / "cache", scan=scan) for scan in (True, False))
    )
    assert scanned == taken
    return scanned


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b"\xef\xbb\xbf", []),
        (b'{"a":1}', [(1, {"a": 1})]),
        (b'{"a":1}\n{"a":2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a":1}\r\n{"a":2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\xef\xbb\xbf{"a":1}\n{"a":2}', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\xef\xbb\xbf\n{"a":1}', [(2, {"a": 1})]),
        (b'\n\n{"a":1}\n  \n{"a":2}\n\n', [(3, {"a": 1}), (5, {"a": 2})]),
        (b'{"a":1}\n   ', [(1, {"a": 1})]),
        (b' \t{"a" : 1} \n', [(1, {"a": 1})]),
        (b'{"a":"\xc3\xbc\xe2\x80\xa8"}\n', [(1, {"a": "ü\u2028"})]),
        (b'{"a":"\\ud83d\\ude42 \\\\ud83d"}\n', [(1, {"a": "🙂 \\ud83d"})]),
    ],
)
def test_lines_that_are_rows(content: bytes, rows: Read, tmp_path: Path) -> None:
    assert read(content, tmp_path) == rows


DEEP = b'{"a":' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}"
DEEPER = DEEP.replace(b"[]", b"[[]]")

BAD = [
    (b'{"a":', "malformed_json", "line 2 of a.jsonl is not valid JSON: Expecting value at column 6"),
    (b'{"a":1} {"a":2}', "malformed_json", "Extra data at column 9"),
    (b"{'a':1}", "malformed_json", "Expecting property name"),
    (b"\0", "malformed_json", "Expecting value at column 1"),
    (b'{"a":"\xff"}', "malformed_json", "line 2 of a.jsonl is not UTF-8: byte 7 is 0xff"),
    (b'{"a":"\xed\xa0\x80"}', "malformed_json", "is not UTF-8"),
    (b'{"a":"\\ud83d"}', "malformed_json", "line 2 of a.jsonl has \\ud83d in a text: half of a surrogate pair"),
    (b'{"\\uDE42":1}', "malformed_json", "has \\ude42 in a text"),
    (b'{"a":NaN}', "malformed_json", "NaN is not JSON"),
    (b'{"a":-Infinity}', "malformed_json", "-Infinity is not JSON"),
    (b'{"a":1e999}', "malformed_json", "the number 1e999 is too large"),
    (b'{"a":' + b"9" * 5000 + b"}", "malformed_json", "is not valid JSON: a number of 5000 digits is too long"),
    (b'{"a":1,"b":{"c":1,"c":1}}', "malformed_json", 'an object has the key "c" twice, and only one can be meant'),
    (DEEPER, "malformed_json", "more than 200 levels deep"),
    (b'{"a":' + b"[" * 100_000, "malformed_json", "more than 200 levels deep"),
    (b"[1]", "wrong_type", "line 2 of a.jsonl holds a list, not an object"),
    (b'"a"', "wrong_type", "holds a text"),
    (b"1", "wrong_type", "holds a number"),
    (b"1.5", "wrong_type", "holds a number"),
    (b"true", "wrong_type", "holds true or false"),
    (b"null", "wrong_type", "holds null"),
]


@pytest.mark.parametrize(("line", "kind", "sentence"), BAD)
def test_a_bad_line_is_an_error_row_between_good_ones(line: bytes, kind: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":3}\n')
    before, bad, after = (row.value for row in Input.open([str(path)], tmp_path / "cache", scan=True).rows(range(3)))
    assert (before, after) == ({"a": 1}, {"a": 3})
    assert isinstance(bad, RowError)
    assert (bad.type, bad.line) == (kind, 2)
    assert sentence in bad.message


@pytest.mark.parametrize(
    ("line", "own"),
    [
        (b'{"prompt":"a","x":NaN,"id":"i"}', "i"),
        (b'{"custom_id":"c","url":"/v1/completions","body":{"prompt":"a","prompt":"b"},"id":"i"}', "c"),
        (b'{"id":7,"prompt":"a","x":1e999}', "7"),
        (b'{"prompt":"\\ud83d","id":"i"}', "i"),
        (b'{"prompt":"\xff","id":"i"}', "i"),
        (b'{"x":' + b"[" * DEEPEST + b"]" * DEEPEST + b',"custom_id":"c"}', "c"),
        (b'{"custom_id":"c","x":' + b"[" * 100_000, "c"),
        (b'{"id":"i","prompt":"cut off', "i"),
        (b'{"id":"cut off', None),
        (b'{"id":12', None),
        (b'{"id":"a","id":"b","prompt":"x"}', None),  # only one can be meant
        (b'{"id":"a","id":"a","prompt":"x"}', "a"),
        (b'{"id":"\\ud83d","prompt":"x"}', None),
        (b'{"id":"\xff","prompt":"x"}', None),
        (b'{"id":"","prompt":NaN}', None),
        (b'{"id":[1],"custom_id":"c","prompt":NaN}', "c"),
        (b'{"x":{"id":"inner"},"y":NaN}', None),
    ],
)
def test_a_bad_line_keeps_the_id_that_can_be_read(line: bytes, own: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    (row,) = Input.open([str(path)], tmp_path / "cache", scan=True).rows(range(1))
    assert isinstance(row.value, RowError)
    assert (row.value.id, row_id(row)) == (own, own or "a.jsonl:1")


def test_lists_may_be_nested_so_deep(tmp_path: Path) -> None:
    assert read(DEEP, tmp_path) == [(1, json.loads(DEEP))]


@given(
    st.binary() | st.lists(st.sampled_from([b"{}", b"\n", b" ", b"\r", b"\xef\xbb\xbf", b"[", b"\xff"])).map(b"".join)
)
def test_no_bytes_are_too_strange(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(content)
        if packing_of(Path(folder) / "a") is not None or other_kind(content) is not None:
            with pytest.raises(InputError, match=r"is not JSON lines|cannot be unpacked"):
                read(content, Path(folder))
            return
        rows = read(content, Path(folder))
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [line for line, _ in rows] == [number for number, line in enumerate(lines, 1) if line.strip()]


@pytest.mark.parametrize("step", [1, 7, 1000, 9000])
def test_more_rows_than_are_read_at_once(step: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"n": n, "text": "x" * (n % 100)} for n in range(10_000)]
    rows[5000]["text"] = "long" * WINDOW
    path.write_text("".join(json.dumps(row) + "\n" * (1 + (n % 10 == 0)) for n, row in enumerate(rows)))
    source = Input.open([str(path)], tmp_path / "cache", scan=True)
    found = [(row.index, row.line, row.value) for row in source.rows(range(0, 10_000, step))]
    assert found == [(n, n + 1 + (n + 9) // 10, rows[n]) for n in range(0, 10_000, step)]


def test_a_file_rewritten_with_the_same_size_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":20}\n')
    source = Input.open([str(path)], tmp_path / "cache", scan=True)
    path.write_bytes(b'{"a":10}\n{"a":2}\n')
    with pytest.raises(
        InputError, match="has changed: it is as long as when the run started, but holds something else"
    ):
        list(source.rows([0]))


def test_a_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' * 100_000)
    source = Input.open([str(path)], tmp_path / "cache", scan=True)
    rows = source.rows(range(100_000))
    next(rows)
    os.truncate(path, 400_004)
    with pytest.raises(InputError, match="has changed while it was read"):
        list(rows)


def test_an_index_of_another_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({name: 1}))
        Input.open([f"{tmp_path}/{name}.jsonl"], tmp_path / name, scan=True)
    (tmp_path / "a" / "00000.offsets").rename(tmp_path / "b" / "00000.offsets")
    with pytest.raises(InputError, match=r"00000.offsets is not the index of .*b.jsonl, or damaged"):
        Input.open([f"{tmp_path}/b.jsonl"], tmp_path / "b", scan=False)


def test_plain_files_need_no_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a":1}\n')
    code = (
        "import sys; from pathlib import Path; from batchgen.formats.input import Input; "
        "i = Input.open([sys.argv[1] + '/a.jsonl'], Path(sys.argv[1], 'cache'), scan=True); "
        "assert [row.value for row in i.rows([0])] == [{'a': 1}]; "
        "assert not {'pyarrow', 'datasets', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


PACKED = [("a.jsonl.gz", partial(gzip.compress, mtime=0)), ("a.ndjson.zst", zstd)]
CONTENT = b'{"a":1}\n\n{"a":2}\n' * 1000


@pytest.mark.parametrize(("name", "pack"), PACKED)
def test_compressed_files_have_the_same_rows(name: str, pack: type[bytes], tmp_path: Path) -> None:
    assert read(pack(CONTENT), tmp_path, name) == read(CONTENT, tmp_path)
    assert read(pack(CONTENT) + pack(CONTENT), tmp_path, name) == read(CONTENT * 2, tmp_path)
    assert read(pack(b""), tmp_path, name) == []


@pytest.mark.parametrize(("name", "pack"), PACKED)
@pytest.mark.parametrize("cached", ["00000.jsonl", "00000.offsets"])
@pytest.mark.parametrize("place", [0, 21, -1])
def test_a_byte_changed_in_the_cache_of_a_compressed_file_changes_no_row(
    name: str, pack: type[bytes], cached: str, place: int, tmp_path: Path
) -> None:
    content = b"".join(b'{"prompt": "text %d"}\n' % number for number in range(100))
    rows = read(pack(content), tmp_path, name)
    changed = bytearray((tmp_path / "cache" / cached).read_bytes())
    changed[place] ^= 1
    (tmp_path / "cache" / cached).write_bytes(changed)
    assert read(pack(content), tmp_path, name) == rows


def test_an_index_with_a_changed_byte_is_not_taken_for_one(tmp_path: Path) -> None:
    read(b'{"prompt": "a"}\n' * 9, tmp_path)
    index = tmp_path / "cache" / "00000.offsets"
    changed = bytearray(index.read_bytes())
    changed[-9] ^= 1
    index.write_bytes(changed)
    with pytest.raises(InputError, match=r"00000.offsets is not the index of .*, or damaged"):
        Input.open([str(tmp_path / "a.jsonl")], tmp_path / "cache", scan=False)


@pytest.mark.parametrize(("name", "pack"), PACKED)
def test_compressed_files_are_unpacked_once(name: str, pack: type[bytes], tmp_path: Path) -> None:
    text = tmp_path / "cache" / "00000.jsonl"
    first = read(pack(CONTENT), tmp_path, name)
    made = text.stat()
    assert read(pack(CONTENT), tmp_path, name) == first
    assert (text.stat().st_ino, text.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert len(read(pack(CONTENT * 2), tmp_path, name)) == 2 * len(first)
    os.truncate(text, 5)
    assert len(read(pack(CONTENT * 2), tmp_path, name)) == 2 * len(first)


@pytest.mark.parametrize(("name", "pack"), PACKED)
@pytest.mark.parametrize("damage", ["cut off", "something else", "something behind"])
def test_damaged_compressed_files(name: str, pack: type[bytes], damage: str, tmp_path: Path) -> None:
    packed = pack(bytes(os.urandom(1000)))
    content = {
        "cut off": packed[:-20],
        "something else": b'["a"]\n' * 100,
        "something behind": packed + b"something",
    }[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} cannot be unpacked: .*damaged, or was cut off"):
        Input.open([f"{tmp_path}/{name}"], tmp_path / "cache", scan=True)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("name", "pack"), PACKED)
def test_no_room_to_unpack(name: str, pack: type[bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pack(CONTENT * 100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(InputError, match=f"cannot unpack .*{name} into .*cache: File too large. It needs room"):
            Input.open([f"{tmp_path}/{name}"], tmp_path / "cache", scan=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []
