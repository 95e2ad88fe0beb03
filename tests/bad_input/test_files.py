"""Files that cannot be read as what their names say: exit 4 and a sentence that names the file and says what to do."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.bad_input.command import answered, call
from tests.commands.starts import call as call_alone

GOOD = b'{"id":"a","prompt":"one"}\n{"id":"b","prompt":"two"}\n'
ZSTD: bytes = pa.compress(GOOD, codec="zstd", asbytes=True)
GZIP = gzip.compress(GOOD, mtime=0)
DAMAGED = "It is damaged, or was cut off"
ENDED = f"ended before the end-of-stream marker was reached. {DAMAGED}"
TEXT = GOOD.decode()
ROWS = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}]
ARRAY = " is not JSON lines: it is one JSON array. Turn it into lines: jq -c '.[]'"
OBJECT = " is not JSON lines: it is JSON over several lines. Put each object on one line: jq -c ."


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "there is no row in a.jsonl: it is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "there is no row in a.jsonl: it is empty"),
        ("a.jsonl", b"\n \r\n\n", "there is no row in a.jsonl: it is empty"),
        ("a.jsonl.gz", b"", "there is no row in a.jsonl.gz: it is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "there is no row in a.jsonl.gz: it is empty"),
        ("a.jsonl.zst", b"", "there is no row in a.jsonl.zst: it is empty"),
        ("a.parquet", b"", "a.parquet cannot be read as Parquet: Parquet file size is 0 bytes"),
        ("a.arrow", b"", "a.arrow cannot be read as Arrow: "),
        ("a.jsonl", TEXT.encode("utf-16"), "a.jsonl is not JSON lines: it is UTF-16 or UTF-32. Turn it into UTF-8"),
        ("a.jsonl", ("\ufeff" + TEXT).encode("utf-16-be"), "it is UTF-16. Turn it into UTF-8: iconv -f UTF-16"),
        ("a.jsonl", TEXT.encode("utf-32"), "it is UTF-16 or UTF-32"),
        ("a.jsonl", TEXT.encode("utf-16-le"), "it is UTF-16 or UTF-32. Turn it into UTF-8"),
        ("a.jsonl", TEXT.encode("utf-16-be"), "it is UTF-16. Turn it into UTF-8: iconv -f UTF-16BE"),
        ("a.jsonl", json.dumps(ROWS, indent=2).encode(), ARRAY),
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(), ARRAY),
        ("a.jsonl", json.dumps(ROWS).encode(), ARRAY),
        ("a.jsonl", b"\n [ " + json.dumps(ROWS)[1:].encode() + b"\n", ARRAY),
        ("a.jsonl", ("[ " + json.dumps(ROWS * 9_999)[1:]).encode(), ARRAY),
        ("a.jsonl", b"[]", ARRAY),
        ("a.jsonl", json.dumps(ROWS, indent=2)[:-40].encode(), ARRAY),
        ("a.jsonl.gz", gzip.compress(json.dumps(ROWS * 9_999, indent=1).encode(), mtime=0), ARRAY),
        ("a.jsonl.zst", pa.compress(json.dumps(ROWS * 9_999, indent=1).encode(), codec="zstd", asbytes=True), ARRAY),
        ("a.jsonl", json.dumps(ROWS[0], indent=2).encode(), OBJECT),
        ("a.jsonl", json.dumps({"data": ROWS * 9_999}, indent=4).encode(), OBJECT),
        ("a.jsonl", "\n".join(json.dumps(row, indent="\t") for row in ROWS).encode(), OBJECT),
        ("a.jsonl", json.dumps(ROWS[0], indent=2)[:-9].encode(), OBJECT),
        ("a.jsonl.gz", gzip.compress(GZIP, mtime=0), "it is compressed with gzip twice"),
        ("a.jsonl", b"PAR1" + bytes(20), "it is Parquet. Let its name end in .parquet"),
        ("a.jsonl", b"ARROW1" + bytes(20), "it is Arrow. Let its name end in .arrow"),
        ("a.jsonl.gz", GZIP[:-1], ENDED),
        ("a.jsonl.gz", gzip.compress(random.Random(5).randbytes(3000), mtime=0)[:1500], ENDED),
        ("a.jsonl.gz", GZIP[:5], ENDED),
        ("a.jsonl.gz", GZIP[:-8] + bytes(4) + GZIP[-4:], "a.jsonl.gz cannot be unpacked: CRC check failed"),
        ("a.jsonl.gz", GZIP[:-4] + bytes(4), "a.jsonl.gz cannot be unpacked: Incorrect length of data produced"),
        ("a.jsonl.gz", GZIP + b"garbage", f"a.jsonl.gz cannot be unpacked: Not a gzipped file (b'ga'). {DAMAGED}"),
        ("a.jsonl.gz", GZIP + GZIP[:-3], ENDED),
        ("a.jsonl.gz", GZIP[:12] + bytes([GZIP[12] ^ 255]) + GZIP[13:], "a.jsonl.gz cannot be unpacked: "),
        ("a.jsonl.zst", ZSTD[:-1], f"a.jsonl.zst cannot be unpacked: Truncated compressed stream. {DAMAGED}"),
        ("a.jsonl.zst", ZSTD + b"garbage", "a.jsonl.zst cannot be unpacked: ZSTD decompress failed"),
        ("a.txt", GOOD, "a.txt is of no known format: it must be a file that ends in .arrow"),
        ("a.json", GOOD, "a.json is of no known format"),
        ("a.jsonl.bz2", GOOD, "a.jsonl.bz2 is of no known format"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 15 else "",
)  # fmt: skip
def test_a_file_of_something_else_or_cut_off_is_refused(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert ended.err.startswith("Error: ")
    assert sentence in ended.err
    assert not list((tmp_path / "out").glob("generations*"))


@pytest.mark.parametrize(
    "content", [GZIP + gzip.compress(GOOD.replace(b'"', b' "')), GZIP + bytes(512)], ids=["members", "padding"]
)
def test_gzip_of_several_members_or_with_zeros_behind_is_good(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    ended = call(tmp_path, "run", "a.jsonl.gz", "-o", "out", "--engine", "echo")
    rows = answered(tmp_path / "out")
    assert [row["text"] for row in rows[:2]] == ["one", "two"]
    assert (ended.code, len(rows)) == ((3, 4) if len(content) < 300 else (0, 2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.jsonl", packed) for packed in (GZIP, ZSTD)),
        *(("a.jsonl.gz", packed) for packed in (GOOD, ZSTD, b"\xef\xbb\xbf" + GOOD)),
        ("a.jsonl.zst", GOOD),
        ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + GOOD, mtime=0)),
        ("a.jsonl", b"\xef\xbb\xbf\r\n" + GOOD),
    ],
)
def test_what_is_in_a_file_of_lines_counts_and_not_whether_its_name_says_compressed(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    ended = call(tmp_path, "run", name, "-o", "out", "--engine", "echo", "--ranks", 2)
    assert ended.code == 0, ended.err
    assert [row["text"] for row in answered(tmp_path / "out")] == ["one", "two"]


@pytest.mark.parametrize(
    ("first", "failed"),
    [
        (b'{"id": "x",', 1),
        (b'{"id": "x", "prompt": ["a",', 1),
        (b"{", 1),
        (b'{"id": "x", "prompt": "a\nb"}', 2),
        (b"[1, 2]", 1),
        (b'["a"', 1),
    ],
)
def test_a_broken_first_line_costs_no_other_row(first: bytes, failed: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(first + b"\n" + GOOD)
    ended = call(tmp_path, "run", "a.jsonl", "-o", "out", "--engine", "echo")
    rows = answered(tmp_path / "out")
    assert (ended.code, [row["text"] for row in rows]) == (3, [*[None] * failed, "one", "two"])


def test_an_empty_file_among_others_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert call(tmp_path, "run", "*.jsonl", "-o", "out", "--engine", "echo").code == 0
    assert [row["text"] for row in answered(tmp_path / "out")] == ["one", "two"]


def _link_to_itself(folder: Path) -> str:
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    return "loop.jsonl"


def _link_to_nothing(folder: Path) -> str:
    (folder / "link.jsonl").symlink_to("nothing.jsonl")
    return "link.jsonl"


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.jsonl")
    return "pipe.jsonl"


def _folder(folder: Path) -> str:
    (folder / "folder.jsonl").mkdir()
    return "folder.jsonl"


def _below_a_file(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(GOOD)
    return "a.jsonl/b.jsonl"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: "none.jsonl", "there is no file none.jsonl"),
        (_link_to_nothing, "there is no file link.jsonl"),
        (_below_a_file, "there is no file a.jsonl/b.jsonl"),
        (_link_to_itself, "cannot open loop.jsonl: Too many levels of symbolic links"),
        (lambda folder: "x" * 300 + ".jsonl", "xxx.jsonl: File name too long"),
        (
            _pipe,
            "pipe.jsonl is neither a file nor a folder, and has no end or can be read only once. Put its rows into",
        ),
        (lambda folder: "/dev/zero", "/dev/zero is neither a file nor a folder"),
        (_folder, "folder.jsonl is a folder, but not one that datasets saved"),
    ],
)
@pytest.mark.parametrize("out", [["-o", "out"], []], ids=["", "folder unnamed"])
def test_what_is_no_file_is_refused(make: Callable[[Path], str], sentence: str, out: list[str], tmp_path: Path) -> None:
    ended = call(tmp_path, "run", make(tmp_path), *out, "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert "Traceback" not in ended.err
    assert sentence in ended.err or (not out and "File name too long" in ended.err)


def _obey_permissions() -> None:
    """Root without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) reads what its owner lets it. capabilities(7)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused where it is not needed


def test_files_without_permission_are_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    for path in ("a.jsonl", "closed/b.jsonl", "c.parquet"):
        (tmp_path / path).write_bytes(GOOD)
    (tmp_path / "a.jsonl").chmod(0)
    (tmp_path / "c.parquet").chmod(0)
    (tmp_path / "closed").chmod(0)
    for path, sentence in (
        ("a.jsonl", "cannot read or write a.jsonl: Permission denied"),
        ("closed/b.jsonl", "cannot open closed/b.jsonl: Permission denied"),
        ("c.parquet", "cannot read or write c.parquet: Permission denied"),
    ):
        ended = call_alone(tmp_path, "run", path, "-o", "out", "--engine", "echo", before=_obey_permissions)
        assert (ended.code, ended.out) == (4, ""), ended
        assert sentence in ended.err


@pytest.mark.parametrize("name", ["generations.jsonl", "errors.jsonl", "timing.jsonl", "generations-00001-00000.jsonl"])
def test_an_input_in_the_place_of_the_output_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "link.jsonl").symlink_to(name)
    for given in (name, "link.jsonl"):
        ended = call(tmp_path, "run", given, "-o", ".", "--engine", "echo")
        assert ended.code == 4
        assert f"{given} is a file that the run in . writes: its rows would be lost. Move it, or choose" in ended.err
    assert (tmp_path / name).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("", "state.json is damaged"),
        ("[" * 100_000, "state.json is damaged: maximum recursion depth"),
        ('{"_data_files": 5}', "does not name the files of the dataset"),
        ('{"_data_files": [{"filename": 5}]}', "does not name the files of the dataset"),
        ('{"_data_files": [{"filename": "a\\u0000b"}]}', "does not name the files of the dataset"),
        ('{"_data_files": [{"filename": "\\ud800"}]}', "does not name the files of the dataset"),
        ('{"_data_files": [{"filename": ""}]}', "does not name the files of the dataset"),
        ('{"_data_files": [{"filename": "%s"}]}' % ("x" * 300), "File name too long"),
        ('{"_data_files": [{"filename": "none.arrow"}]}', "none.arrow: No such file"),
        ('{"_data_files": [{"filename": "state.json"}]}', "state.json cannot be read as an Arrow stream"),
        ('{"_data_files": []}', "set is a dataset without files"),
    ],
    ids=lambda value: value[:50],
)  # fmt: skip
def test_a_damaged_folder_of_datasets_is_refused(state: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/state.json").write_text(state)
    ended = call(tmp_path, "run", "set", "-o", "out", "--engine", "echo")
    assert (ended.code, ended.out) == (4, ""), ended
    assert "Traceback" not in ended.err
    assert sentence in ended.err


def test_a_folder_of_splits_that_are_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": 5}')
    ended = call(tmp_path, "run", "set", "-o", "out", "--engine", "echo")
    assert ended.code == 4
    assert "set holds several splits. Name one of them instead" in ended.err
