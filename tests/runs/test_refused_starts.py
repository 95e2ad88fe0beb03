"""A refused start leaves the run folder as it was, byte for byte; `run.json` alone says what a run began with."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import Host, Recipe, RunSettings, SamplingParams, Status, checkpoint, run
from batchgen.checkpoint import RunFolder
from batchgen.formats import Changed
from batchgen.formats.input import Input
from batchgen.types import UserError
from tests.commands.starts import ENVIRONMENT, read_rows

Rows = Sequence[dict[str, Any]]
Write = Callable[[Path, Rows], None]

ALONE = Host(ENVIRONMENT)


def _text(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _lines(path: Path, rows: Rows) -> None:
    path.write_bytes(_text(rows))


def _gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(_text(rows), mtime=0))


def _zstandard(path: Path, rows: Rows) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(_text(rows))


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def _arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _folder(path: Path, rows: Rows) -> None:
    """As `datasets` saves one."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(str(path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


FORMATS: dict[str, Write] = {
    "p.jsonl": _lines,
    "p.jsonl.gz": _gzip,
    "p.jsonl.zst": _zstandard,
    "p.parquet": _parquet,
    "p.arrow": _arrow,
    "p": _folder,
}

# Without ids: they are made from the file's name.
RIGHT: Rows = [{"prompt": f"prompt {number}"} for number in range(30)]
WRONG: tuple[Rows, ...] = (
    [{"prompt": "another"}, *RIGHT[1:]],
    [{"prompt": "one more"}, *RIGHT],
    [*RIGHT, {"prompt": "one more"}],  # of lines, this is the input that has grown
    RIGHT[:7],
)


def content(out: Path) -> dict[str, bytes | None]:
    """All that is in a folder: what each file holds, None for a folder."""
    return {str(path.relative_to(out)): None if path.is_dir() else path.read_bytes() for path in out.rglob("*")}


def start(inputs: Sequence[Path], out: Path, **settings: Any) -> Status:
    return run([str(path) for path in inputs], out, RunSettings(engine="echo", **settings), host=ALONE)


def refused(inputs: Sequence[Path], out: Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        start(inputs, out, **settings)
    return caught.value


def cut_short(out: Path) -> None:
    """Leaves of a finished run what a kill in the middle of it leaves."""
    for name in ("generations.jsonl", "errors.jsonl", "timing.jsonl", "merged.json"):
        (out / name).unlink()
    records = out / "batches-00001-00000.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:2]))


@pytest.fixture(params=FORMATS)
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Write, Path]:
    """An input, what writes it, and the folder of a run over it that has half of the rows."""
    path, write = tmp_path / request.param, FORMATS[request.param]
    write(path, RIGHT)
    start([path], tmp_path / "out", batch_size=7)
    cut_short(tmp_path / "out")
    return path, write, tmp_path / "out"


def lose_record(out: Path) -> None:
    (out / "input" / "00000.json").unlink()


def lose_cache(out: Path) -> None:
    shutil.rmtree(out / "input")


def take_wrong_cache(out: Path) -> None:
    """As a start with another input could leave it behind in earlier versions."""
    _lines(out.parent / "wrong.jsonl", WRONG[0])
    start([out.parent / "wrong.jsonl"], out.parent / "wrong")
    lose_cache(out)
    (out.parent / "wrong" / "input").rename(out / "input")


@pytest.mark.parametrize("harm", [Path.exists, lose_record, lose_cache, take_wrong_cache])
def test_another_input_leaves_nothing_and_the_right_one_goes_on(
    harm: Callable[[Path], object], begun: tuple[Path, Write, Path]
) -> None:
    path, write, out = begun
    harm(out)
    before = content(out)
    for rows in WRONG:
        if rows is WRONG[2] and "jsonl" in path.name:
            continue
        write(path, rows)
        error = refused([path], out)
        assert isinstance(error, Changed)
        assert str(error).startswith(f"{path} {Changed.CAUSE}")
        assert str(error).endswith(". Put it back as it was, or start a new run with another -o")
        assert content(out) == before
    write(path, RIGHT)
    moved = path.rename(path.with_name(f"moved-{path.name}"))
    status = start([moved], out)
    assert (status.state, status.good) == ("finished", 30)
    # The name that a run began with is a part of the ids, and of the seeds of sampling.
    assert [row["id"] for row in read_rows(out / "generations.jsonl")] == [f"{path.name}:{n}" for n in range(1, 31)]
    assert {path.name for path in (out / "input").iterdir()} >= {"00000.json", "duplicates.json"}


REASONS: dict[str, dict[str, Any]] = {
    "sampling": {"recipe": Recipe(sampling=SamplingParams(max_new_tokens=3))},
    "template": {"recipe": Recipe(template="{% if %}")},
    "strict": {"strict": True, "recipe": Recipe(prompt_column="no")},
    "setting": {"engine_settings": ["no=1"]},
    "batch size": {"batch_size": 0},
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_start_refused_for_another_reason_leaves_nothing_either(reason: str, tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl.gz", tmp_path / "new" / "folder" / "out"
    _gzip(path, RIGHT)
    if reason != "sampling":
        refused([path], out, **REASONS[reason])
        assert not (tmp_path / "new").exists()
    start([path], out)
    lose_cache(out)
    before = content(out)
    refused([path], out, **REASONS[reason])
    assert content(out) == before


def test_of_several_files_the_one_that_has_changed_is_named(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    for file, write in zip(files, (_lines, _gzip, _parquet), strict=True):
        write(file, [{"prompt": f"{file.name} {number}"} for number in range(5)])
    out = tmp_path / "out"
    start(files, out)
    before = content(out)
    assert f"the input of 2 files ({files[0]}, {files[1]}) {Changed.CAUSE}" in str(refused(files[:2], out))
    _gzip(files[1], RIGHT)
    assert f"{files[1]} {Changed.CAUSE}" in str(refused(files, out))
    assert content(out) == before


def test_of_two_first_starts_the_one_that_comes_second_leaves_the_index_of_the_other(tmp_path: Path) -> None:
    """Both have found a new folder, and have scanned their inputs before the first one has begun."""
    _lines(tmp_path / "a.jsonl", RIGHT)
    _gzip(tmp_path / "b.jsonl.gz", WRONG[0])
    out = RunFolder(tmp_path / "out")
    out.make()
    second = Input.open([str(tmp_path / "b.jsonl.gz")], out.input_cache, scan=True, into=out.input_cache / "new")
    start([tmp_path / "a.jsonl"], out.path)
    with pytest.raises(Changed, match=r"b\.jsonl\.gz is not what the run began with"):
        out.check_or_create(
            out.read_identity() | {"input": second.digest}, {"input_files": [str(tmp_path / "b.jsonl.gz")]}
        )
    shutil.rmtree(out.input_cache / "new")
    assert {file.name for file in out.input_cache.iterdir()} == {
        *("00000.json", "00000.offsets", "00000.rows", "duplicates.json")
    }


EARLIER = Path(__file__).parents[1] / "checkpoint" / "left_by_0.1.0"


@pytest.mark.parametrize("harm", [Path.exists, lose_cache, take_wrong_cache])
def test_a_run_of_an_earlier_version_goes_on_with_its_input_alone(
    harm: Callable[[Path], object], tmp_path: Path
) -> None:
    """Such a run has recorded one digest of all files, and where they lay."""
    path, out = tmp_path / "moved.jsonl", tmp_path / "out"
    shutil.copytree(EARLIER / "run", out)
    harm(out)
    before = content(out)
    _lines(path, RIGHT)
    assert f"{path} {Changed.CAUSE}" in str(refused([path], out))
    assert content(out) == before
    shutil.copy(EARLIER / "prompts.jsonl", path)
    status = start([path], out)
    assert (status.state, status.good, len(status.attempts)) == ("finished", 12, 2)
    assert [row["id"] for row in read_rows(out / "generations.jsonl")] == [f"prompts.jsonl:{n}" for n in range(1, 13)]


BEFORE_THE_ROOMS = Path(__file__).parents[1] / "checkpoint" / "left_before_the_rooms"

# A run folder as the version left it that had all modules at the top of the package: how it stands, before and after
# one more start with its input.
LEFT: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int]]] = {
    "finished": ("prompts.jsonl", (12, 0, 0), (12, 0, 0)),
    "half_done": ("prompts.jsonl", (3, 0, 9), (12, 0, 0)),
    "with_errors": ("faulty.jsonl", (10, 2, 0), (10, 2, 0)),
    "with_shards": ("prompts.jsonl", (8, 0, 4), (12, 0, 0)),
}


@pytest.mark.parametrize("left", LEFT)
def test_a_run_of_the_version_before_goes_on(left: str, tmp_path: Path) -> None:
    name, before, after = LEFT[left]
    out = Path(shutil.copytree(BEFORE_THE_ROOMS / left, tmp_path / "out"))
    recorded = {path: path.read_bytes() for path in out.glob("*-[0-9]*-[0-9]*.jsonl")}
    counts = checkpoint.status(RunFolder(out))
    assert (counts.good, counts.failed, counts.open) == before
    status = start([BEFORE_THE_ROOMS / name], out)
    assert (status.good, status.failed, status.open, status.merged) == (*after, True)
    lines = [f"{name}:{number}" for number in range(1, 13)]
    failed = [row["id"] for row in read_rows(out / "errors.jsonl")]
    assert failed == (["bad-3", "bad-7"] if left == "with_errors" else [])
    ids = [row["id"] for row in read_rows(out / "generations.jsonl")]
    assert ids == [failed[[3, 7].index(n)] if failed and n in (3, 7) else line for n, line in enumerate(lines)]
    assert {path: path.read_bytes() for path in recorded} == recorded, "what was finished is generated once"


def test_a_run_from_before_texts_were_split_goes_on_with_whole_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _lines(tmp_path / "p.jsonl", RIGHT)
    out = tmp_path / "out"
    start([tmp_path / "p.jsonl"], out, batch_size=7)
    cut_short(out)
    error = refused([tmp_path / "p.jsonl"], out, recipe=Recipe(tool_parser="hermes"))
    assert 'tool_parser was "auto", now "hermes"' in str(error)
    manifest = json.loads((out / "run.json").read_text())
    for name in ("reasoning_parser", "tool_parser"):
        assert manifest["asked"].pop(name) == "auto"
    (out / "run.json").write_text(json.dumps(manifest))
    caplog.set_level("INFO")
    assert start([tmp_path / "p.jsonl"], out).state == "finished"
    assert "this run began with --reasoning-parser none, and goes on with it" in caplog.text
    assert "this run began with --tool-parser none, and goes on with it" in caplog.text
