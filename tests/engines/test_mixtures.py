"""200 rows with 20 random mixtures of parameters: killed, and ended by another engine, they are the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchgen import Host, RunSettings, run
from batchgen.types import PARAMS
from tests import tiny_models
from tests.commands.starts import ENVIRONMENT, read_rows, write_rows
from tests.engines import runs
from tests.tiny_models import END

COUNT, MIXTURES = 200, 20
# The prompt of a conversation begins the thinking.
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "[assistant]{% if add_generation_prompt %}<think>{% if enable_thinking is false %}</think>{% endif %}{% endif %}"
)
LETTERS = list(range(68, 94))  # a to z: bytes follow four special tokens, in the order of their characters
LISTS = {"type": "array", "items": {"enum": ["a", "ü", 3]}, "minItems": 1, "maxItems": 4}
CONSTRAINTS: Sequence[dict[str, Any]] = (
    {"json_schema": LISTS},
    {"json_schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    {"regex": "([a-h]{2}[.,]){2,9}"},
    {"choice": ["yes", "no", "dépend"]},
    {"grammar": 'start: item ("," item)*\nitem: /[0-9]{1,3}/'},
)
VALUES: dict[str, Sequence[Any]] = {
    "max_new_tokens": (6, 18, 30),
    "temperature": (0.6, 1.0, 1.7),
    "top_p": (0.7, 0.95),
    "top_k": (4, 60),
    "min_p": (0.02, 0.2),
    "seed": (1, 2**40),
    "n": (2, 3),
    "repetition_penalty": (0.8, 1.3),
    "presence_penalty": (-0.5, 1.0),
    "frequency_penalty": (-0.2, 0.6),
    "logit_bias": ({str(END): 4.0}, {"68": 3.0, "69": -100, "100": 2.5}),
    "allowed_token_ids": ([END, *LETTERS], [END, *range(20, 200)]),
    "bad_words": (["a", "bc"], ["e", "th", "ü"]),
    "min_tokens": (2, 5),
    "stop": (["e", "ab"], "t"),
    "include_stop_str_in_output": (True,),
    "stop_token_ids": ([70, 71], list(range(100, 130))),
    "ignore_eos": (True,),
    "skip_special_tokens": (False,),
    "logprobs": (True,),
    "top_logprobs": (1, 5),
    "prompt_logprobs": (0, 2),
    "return_token_ids": (True,),
    "thinking_tokens": (0, 3, 9),
    "constraint": CONSTRAINTS,
}
# With which engine and words of the command a run is begun, and with which it is ended.
STARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accelerate to paged": (("accelerate", "--batch-size", "9"), ("paged", "--batch-size", "14")),
    "paged to accelerate": (("paged", "--batch-size", "5"), ("accelerate", "--batch-size", "30")),
    "two ranks of ds-zero to two of paged": (
        ("ds-zero", "--batch-size", "4", "--ranks", "2"),
        ("paged", "--batch-size", "12", "--ranks", "2"),
    ),
}


def mixture(seed: int) -> dict[str, Any]:
    """Some parameters of a row, by chance; every third has a constraint, and every fourth thinks."""
    source = random.Random(f"mixture {seed}")
    names = {*source.sample(sorted(VALUES.keys() - {"constraint", "thinking_tokens"}), source.randrange(5, 12))}
    drawn = {name: source.choice(VALUES[name]) for name in sorted(names)}
    if "top_logprobs" in drawn:
        drawn["logprobs"] = True
    if seed % 3 == 0:
        drawn |= CONSTRAINTS[seed // 3 % len(CONSTRAINTS)]
        # What a constraint demands may not be forbidden: few such rows have any text.
        drawn.pop("allowed_token_ids", None)
        drawn.pop("stop_token_ids", None)
    if seed % 4 == 0:
        drawn["thinking_tokens"] = source.choice(VALUES["thinking_tokens"])
        drawn["max_new_tokens"] = 40
    return drawn


def make_rows() -> list[dict[str, Any]]:
    source = random.Random(11)
    made = []
    for number in range(COUNT):
        words = "".join(source.choice("abcdefgh ijk é") for _ in range(source.randint(1, 50)))
        own = mixture(number % MIXTURES)
        thinks = "thinking_tokens" in own or number % MIXTURES == 7
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": words}]} if thinks else {"prompt": words}
        made.append({"id": f"row-{number}", **prompt, **own})
    return made


def differ(one: object, other: object) -> bool:
    """Whether two values of JSON are not the same, numbers that were calculated within 1e-4."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) > 1e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differ(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) != len(other) or any(map(differ, one, other))
    return one != other


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A model, a prompt file, and the output of a run of it that nothing has interrupted."""
    place = tmp_path_factory.mktemp("mixtures")
    model = tiny_models.save(place / "model", tiny_models.llama)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    path = write_rows(place / "rows.jsonl", make_rows())
    settings = RunSettings(model=str(model), engine="accelerate", dtype="float32", batch_size=16)
    run(str(path), place / "out", settings, host=Host(ENVIRONMENT))
    return model, path, read_rows(place / "out" / "generations.jsonl")


def test_every_parameter_is_in_some_mixture() -> None:
    """And the mixtures are another each."""
    drawn = [mixture(seed) for seed in range(MIXTURES)]
    assert len({json.dumps(each, sort_keys=True) for each in drawn}) == MIXTURES
    constraints = {"json_schema", "regex", "choice", "grammar"}
    assert set().union(*drawn) >= PARAMS | constraints


@pytest.mark.slow
def test_the_rows_say_much_and_few_fail(job: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    _, _, rows = job
    assert len({row["text"] for row in rows}) > 120
    errors = [row["error"] for row in rows if row["error"]]
    assert {error["type"] for error in errors} <= {"no_token"}, errors
    assert len(errors) < 20
    assert {row["finish_reason"] for row in rows} >= {"stop", "length"}
    assert sum(row.get("reasoning") is not None for row in rows) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_killed_and_ended_by_another_engine_the_rows_are_the_same(
    name: str, job: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    model, path, expected = job
    (engine, *words), (other, *other_words) = STARTS[name]
    out, rank = tmp_path / "out", "1" if "--ranks" in words else "0"
    # That rank commits some rows and never ends the run: the kill comes neither too early nor too late.
    code = runs.STUCK_STEP if engine == "paged" else runs.STUCK
    stuck = os.environ | runs.altered(tmp_path, code, STUCK=rank, OMP_NUM_THREADS="1")
    begin = runs.command(path, out, model, "--heartbeat-seconds", "0.1", *words, engine=engine)
    starter = subprocess.Popen(begin, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT, env=stuck)
    beat = out / "attempts" / f"00001-{int(rank):05d}.json"
    while not (beat.exists() and json.loads(beat.read_bytes())["committed_tokens"] > 0):
        assert starter.poll() is None, "the run ended before"
        time.sleep(0.05)
    starter.kill()
    starter.communicate()
    done = runs.run(*runs.command(path, out, model, *other_words, engine=other))
    assert done.returncode == (3 if any(row["error"] for row in expected) else 0), done.stderr
    assert {json.loads(line)["attempt"] for line in (out / "timing.jsonl").read_text().splitlines()} == {1, 2}
    found = read_rows(out / "generations.jsonl")
    unequal = [(one, another) for one, another in zip(expected, found, strict=True) if differ(one, another)]
    assert not unequal, f"{len(unequal)} rows differ, the first: {unequal[0]}"
