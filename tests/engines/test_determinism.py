"""The same rows and seed give the same text, whatever does them: in float32, greedy rows and sampled ones.

All are compared with a decoder that knows no batch, no cache and no engine. A row asks for no more tokens than come
before its first near tie: there float32, which rounds differently in batches of another shape, may choose differently.
How often bfloat16 does is measured by benchmarks/determinism.py.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from batchgen import Host, Recipe, RunSettings, run
from batchgen.generation.sampling import SamplingTensors, sample
from batchgen.requests.prompts import PromptReader
from batchgen.types import Prompt, Row, Shard
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.engines import runs
from tests.tiny_models import Model

COUNT = 36
MOST_TOKENS = 24
NOISE = 1e-3  # of logits: far more than rounding, and far less than what decides most steps
SAMPLING: Sequence[dict[str, object]] = (
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "seed": 2**40},
)


def steady(model: Model, prompt: Prompt) -> list[int]:
    """The tokens of `prompt`, up to its end or to the first that a little noise on the logits would change."""
    params, noise = prompt.params, torch.Generator().manual_seed(prompt.index)
    seed = prompt.row_seed - (prompt.row_seed >> 63 << 64)
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens and not (tokens and tokens[-1] in model.tokenizer.end_tokens):
        with torch.inference_mode():
            logits = model.model(torch.tensor([[*prompt.tokens, *tokens]]), use_cache=False).logits[:, -1].float()
        tried = torch.cat([logits, logits + NOISE * torch.randn(8, logits.shape[1], generator=noise)])
        chosen = tried.argmax(-1)
        if params.temperature > 0:
            settings = [[params.temperature], [params.top_p]]
            temperature, top_p = torch.tensor(settings, dtype=torch.float64).expand(2, len(tried))
            seeds, steps, top_k = torch.tensor([[seed], [len(tokens)], [params.top_k]]).expand(3, len(tried))
            chosen = sample(tried, seeds, steps, SamplingTensors(temperature, top_k, params.top_k, top_p))
        if len(set(chosen.tolist())) > 1:
            break
        tokens.append(int(chosen[0]))
    return tokens


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several take longer for matrices as small as these, and minutes where others work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | None]]:
    """A prompt file of greedy and sampled rows and some bad ones, and the text that each must become."""
    made: list[dict[str, object]] = []
    letters = random.Random(3)
    for number in range(COUNT):
        text = "".join(letters.choice("abcdefgh ijk") for _ in range(letters.randint(1, 60)))
        row = {"id": f"row-{number}", "prompt": text, "max_new_tokens": MOST_TOKENS, **SAMPLING[number % len(SAMPLING)]}
        made.append(row if number % 11 else {"id": f"row-{number}", "prompt": number})
    model = Model(tiny_llama)
    rows = [Row(number, "p.jsonl", number + 1, row) for number, row in enumerate(made)]
    expected: list[str | None] = []
    for row, prompt in zip(made, PromptReader(Recipe(), model.tokenizer, {}).read(rows), strict=True):
        tokens = steady(model, prompt) if isinstance(prompt, Prompt) else []
        row["max_new_tokens"] = max(1, len(tokens))
        expected.append(model.tokenizer.decode(tokens) if tokens else None)
    good = [row if text is not None else {"prompt": 1} for row, text in zip(made, expected, strict=True)]
    lengths = [int(str(row["max_new_tokens"])) for row in good if "max_new_tokens" in row]
    assert len(lengths) > 20
    assert sum(lengths) > 200, "too few tokens to mean anything"
    assert len({text for text in expected if text}) > 15, "the model repeats itself, so equality means nothing"
    return write_rows(tmp_path_factory.mktemp("job") / "p.jsonl", good), expected


def texts(out: Path) -> list[object]:
    return [row["text"] for row in read_rows(out / "generations.jsonl")]


@pytest.mark.parametrize(
    ("engine", "batch_size", "settings"),
    [
        ("accelerate", 1, ()),
        ("accelerate", 5, ()),
        ("accelerate", None, ()),
        ("paged", 1, ()),
        ("paged", None, ()),
        ("paged", 9, ("cache_tokens=128", "expected_share=0.05", "step_tokens=30")),  # rows are put back, and go on
    ],
)
def test_in_any_batch(
    engine: str,
    batch_size: int | None,
    settings: Sequence[str],
    job: tuple[Path, list[str | None]],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    path, expected = job
    out, model = tmp_path / "out", str(tiny_llama)
    words = {"engine": engine, "batch_size": batch_size, "engine_settings": settings, "dtype": "float32"}
    run(str(path), out, RunSettings(model=model, **words), host=Host(ENVIRONMENT))  # type: ignore[arg-type]
    assert texts(out) == expected


def test_in_any_shards_with_any_engine(job: tuple[Path, list[str | None]], tiny_llama: Path, tmp_path: Path) -> None:
    path, expected = job
    for index, (engine, batch_size) in enumerate((("accelerate", 4), ("paged", 3), ("accelerate", 30))):
        host = Host(ENVIRONMENT, shard=Shard(index, 3))
        words = {"engine": engine, "batch_size": batch_size, "dtype": "float32"}
        run(str(path), tmp_path / "out", RunSettings(model=str(tiny_llama), **words), host=host)  # type: ignore[arg-type]
    assert texts(tmp_path / "out") == expected


@pytest.mark.slow
def test_over_ranks_and_after_a_kill(job: tuple[Path, list[str | None]], tiny_llama: Path, tmp_path: Path) -> None:
    """Begun by two streams of ds-zero in batches of 2, killed with -9, ended by one of ds-inference in batches of 7."""
    path, expected = job
    out = tmp_path / "out"
    # Rank 1 stores a batch and never ends the run: the kill comes neither too early nor too late.
    stuck = os.environ | runs.altered(tmp_path, runs.STUCK, STUCK="1")
    words = runs.command(path, out, tiny_llama, "--heartbeat-seconds", "0.1", "--ranks", "2", "--batch-size", "2")
    starter = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT, env=stuck)
    runs.process_of_rank_1(out, starter, 0, of="committed_tokens")
    starter.kill()
    starter.communicate()
    again = runs.command(path, out, tiny_llama, "--ranks", "2", "--batch-size", "7", engine="ds-inference")
    done = runs.run(*again)
    assert done.returncode == 3, done.stderr  # the bad rows
    assert texts(out) == expected
    by = [json.loads(line)["attempt"] for line in (out / "timing.jsonl").read_text().splitlines()]
    assert set(by) == {1, 2}


def test_rows_without_an_id_keep_theirs_when_the_file_is_renamed(tmp_path: Path) -> None:
    """It is made of the file's name and the line, and their sampling hangs on it."""
    first, out = (
        write_rows(tmp_path / "first.jsonl", [{"prompt": str(number)} for number in range(4)]),
        tmp_path / "out",
    )
    run(str(first), out, RunSettings(engine="echo"), host=Host(ENVIRONMENT, shard=Shard(0, 2)))
    second = first.rename(tmp_path / "second.jsonl")
    run(str(second), out, RunSettings(engine="echo"), host=Host(ENVIRONMENT, shard=Shard(1, 2)))
    assert [row["id"] for row in read_rows(out / "generations.jsonl")] == [
        f"first.jsonl:{line}" for line in range(1, 5)
    ]
