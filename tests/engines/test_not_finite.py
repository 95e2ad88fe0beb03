"""Rows for which the model's numbers are not finite fail, and change nothing of the rows beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from batchgen import Host, RunSettings, run
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.engines import runs
from tests.tiny_models import PAD

CLEAN = [
    {"id": f"c{n}", "prompt": "abcd efgh "[: 1 + n % 10] * (1 + n % 7), "max_new_tokens": 6 + n} for n in range(12)
]
BROKEN = [
    {"id": "z-long", "prompt": "Z" * 60, "max_new_tokens": 30},
    {"id": "z-in-the-middle", "prompt": "abcd efgh abcd efgh Z abcd", "max_new_tokens": 9},
    {"id": "z-sampled", "prompt": "aZ", "temperature": 1.0, "top_p": 0.9, "top_k": 30},
    {"id": "z-logprobs", "prompt": "Z", "logprobs": True},
]


@pytest.fixture(scope="module")
def infinite(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose embedding of "Z", and of the token that fills rows, is infinite."""
    folder = tmp_path_factory.mktemp("infinite")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    [z] = tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[[z, PAD]] = torch.inf
        model.get_output_embeddings().weight[[z, PAD]] = 0  # no row chooses them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(infinite: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """The text of each clean row, generated alone."""
    folder = tmp_path_factory.mktemp("expected")
    texts = {row["id"]: row["text"] for row in generate(folder, infinite, CLEAN, "accelerate", 1)}
    assert len(set(texts.values())) > 8
    return texts


def generate(
    folder: Path, model: Path, rows: Sequence[Mapping[str, object]], engine: str, batch_size: int, *settings: str
) -> list[dict[str, Any]]:
    words = {"engine": engine, "batch_size": batch_size, "engine_settings": settings, "dtype": "float32"}
    path = write_rows(folder / "rows.jsonl", [dict(row) for row in rows])
    run(str(path), folder / "out", RunSettings(model=str(model), **words), host=Host(ENVIRONMENT))  # type: ignore[arg-type]
    return read_rows(folder / "out" / "generations.jsonl")


def check(found: Sequence[Mapping[str, Any]], expected: Mapping[str, object]) -> None:
    texts = {row["id"]: row["text"] for row in found if row["error"] is None}
    assert texts == expected
    failed = {row["id"]: row for row in found if row["error"] is not None}
    assert set(failed) == {row["id"] for row in BROKEN}
    for row in failed.values():
        assert row["error"]["type"] == "not_finite"
        assert "not finite in float32" in row["error"]["message"]
        assert (row["text"], row["finish_reason"], row["generated_tokens"]) == (None, None, 0)
        assert row.get("logprobs") is None or "logprobs" in row["id"]  # its own column, given in the input


@pytest.mark.parametrize(
    ("engine", "batch_size", "settings"),
    [
        ("accelerate", 16, ()),  # rows that are padded are generated again without padding
        ("paged", 3, ()),  # short rows come into pages that those of NaN have left
        ("paged", 16, ("step_tokens=20",)),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_rows_that_are_not_finite_fail_alone(
    engine: str,
    batch_size: int,
    settings: Sequence[str],
    order: int,
    infinite: Path,
    expected: Mapping[str, object],
    tmp_path: Path,
) -> None:
    rows = [*BROKEN, *CLEAN][::order]
    check(generate(tmp_path, infinite, rows, engine, batch_size, *settings), expected)


def test_a_beginning_shared_with_such_a_row_is_good(infinite: Path, tmp_path: Path) -> None:
    """Pages of a common beginning are computed once: by a row that has NaN behind it, here."""
    beginning = "abcd efgh ijkl mnop qrst uvwx yz abcd efgh ijkl mnop "
    rows = [
        {"id": "z", "prompt": beginning + "Z", "max_new_tokens": 9},
        {"id": "clean", "prompt": beginning + "a", "max_new_tokens": 8},
    ]
    broken, clean = generate(tmp_path, infinite, rows, "paged", 1)
    assert broken["error"]["type"] == "not_finite"
    (tmp_path / "alone").mkdir()
    assert [clean] == [{**row, "index": 1} for row in generate(tmp_path / "alone", infinite, rows[1:], "accelerate", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ds-zero", "ds-inference", "paged"])
def test_over_ranks(engine: str, infinite: Path, expected: Mapping[str, object], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [dict(row) for row in [*BROKEN, *CLEAN]])
    more = ["--tp", "2"] if engine != "ds-zero" else ["--ranks", "2"]
    done = runs.run(*runs.command(path, tmp_path / "out", infinite, *more, "--batch-size", "5", engine=engine))
    assert done.returncode == 3, done.stderr
    check(runs.read(tmp_path / "out"), expected)
