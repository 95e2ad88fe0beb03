"""Samples of a row on ranks that call together: one prefill for each prompt of a batch, the same texts, equal steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import batchgen
from tests.engines.runs import altered, command, read, run

# For sitecustomize: each rank writes how many rows each of its prefills has. Steps, and an idle rank, embed one column.
WRITE_PREFILLS = """
import os
if "RANK" in os.environ:
    import torch
    embedding = torch.nn.functional.embedding
    file = open(os.path.join(os.environ["PREFILLS"], os.environ["RANK"]), "a", buffering=1)
    def embed(ids, *weight, **options):
        if ids.dim() == 2 and ids.shape[1] > 1:
            file.write(f"{ids.shape[0]}\\n")
        return embedding(ids, *weight, **options)
    torch.nn.functional.embedding = embed
"""


def write_rows(path: Path) -> Path:
    """Six rows of three samples; the prompts of a batch of six differ in length."""
    with path.open("w") as file:
        for number in range(6):
            text = "".join(chr(97 + (7 * number + 5 * k) % 26) for k in range(10 + 11 * number))
            row = {"id": f"row-{number}", "prompt": text, "n": 3, "temperature": 1.0, "max_new_tokens": 12}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "settings", "prefills"),
    [
        ("ds-zero", [], [2, 1]),  # each rank has three of the rows
        ("ds-zero", ["--offload", "cpu"], [2, 1]),
        ("ds-inference", ["--tp", "2"], [2, 2, 2]),  # both have all of them
    ],
)
def test_samples_share_their_prefill_on_two_ranks(
    engine: str, settings: Sequence[str], prefills: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    prompts, out, written = write_rows(tmp_path / "p.jsonl"), tmp_path / "ranks", tmp_path / "prefills"
    written.mkdir()
    environment = altered(tmp_path, WRITE_PREFILLS, PREFILLS=str(written))
    more = [*settings, "--ranks", "2", "--batch-size", "6", "--no-selftest"]
    done = run(*command(prompts, out, tiny_llama, *more, engine=engine), environment=environment)
    assert done.returncode == 0, done.stderr
    alone = batchgen.RunSettings(model=str(tiny_llama), engine="accelerate", dtype="float32", batch_size=1)
    batchgen.run(str(prompts), tmp_path / "alone", alone)
    found, expected = read(out), read(tmp_path / "alone")
    assert [row["texts"] for row in found] == [row["texts"] for row in expected]
    assert len({text for row in found for text in row["texts"]}) == 18
    seen = [list(map(int, (written / str(rank)).read_text().split())) for rank in range(2)]
    assert seen == [prefills, prefills]
    ends = [json.loads(path.read_bytes()) for path in sorted(out.glob("attempts/00001-*.json"))]
    assert ends[0]["steps"] == ends[1]["steps"] > 0
