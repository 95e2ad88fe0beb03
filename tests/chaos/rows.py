"""Prompt files of uneven work and bad rows, drawn at random, and what must come of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Lines that are no prompts, and the type of error that each must become.
BAD = (
    ('{"prompt": 7}', "wrong_type"),
    ('{"prompt": "abc", "max_new_tokens": "many"}', "wrong_type"),
    ("[1, 2]", "wrong_type"),
    ('{"prompt": "cut off', "malformed_json"),
    ('{"prompt": null}', "missing_prompt"),
    ('{"question": "no prompt at all"}', "missing_prompt"),
)

# Float32 rounds differently in batches of another shape, by some 1e-6 here, and a text may go on differently where the
# two best logits of a step are closer than that. So each prompt is decoded alone first, and a row asks for no more
# tokens than come before its first step with a gap below this one. What a fault changes (a lost token, another row's
# cache or text) does not wait for a near tie, and shows in any row.
CLOSE = 1e-3
_LENGTHS = (1, 2, 5, 12, 40, 120, 300)  # of prompts, in letters
MOST_TOKENS = 120  # to generate for a row


@dataclass(frozen=True)
class Known:
    """A prompt and its greedy continuation, up to its end or to the first step with a close second."""

    prompt: str
    tokens: list[str]  # each as text
    most: int  # tokens that a row may ask for


@dataclass(frozen=True)
class Rows:
    """A prompt file, and what must come of it."""

    path: Path
    count: int
    errors: dict[int, tuple[int, str]]  # by row: its line, and the type of its error
    stops: frozenset[int]  # rows that end at their stop text


def beginning_of(rows: Rows, choose: random.Random) -> Rows:
    """Cuts the file behind some of its rows; the rows that are left."""
    packed = rows.path.suffix == ".gz"
    content = rows.path.read_bytes()
    lines = (gzip.decompress(content) if packed else content).splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines, 1) if line.strip()]
    count = choose.randint(1, len(ends))
    text = b"".join(lines[: ends[count - 1]])
    text = text if choose.random() < 0.5 else text[:-1]
    rows.path.write_bytes(gzip.compress(text) if packed else text)
    errors = {row: error for row, error in rows.errors.items() if row < count}
    return Rows(rows.path, count, errors, frozenset(row for row in rows.stops if row < count))


def save_models(folder: Path) -> list[Path]:
    """A Llama and a BLOOM, random and small, with layers enough that several ranks need seconds for a file."""
    from tests import tiny_models as models

    llama = partial(models.llama, hidden_size=64, num_hidden_layers=6)
    return [
        models.save(folder / "llama", llama),
        models.save(folder / "bloom", partial(models.bloom, n_layer=6), chat=False),
    ]


def known_prompts(model: Path, seed: int = 0, each: int = 16) -> list[Known]:
    """`each` prompts of every length with their greedy continuations, found without batchgen and without padding.

    To be found on one core: several take longer for matrices as small as these, and minutes where others work too.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    choose = random.Random(seed)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded.eval()
    found = []
    for length in _LENGTHS:
        prompts = ["".join(choose.choice("abcdefgh ijklmno") for _ in range(length)) for _ in range(each)]
        steps, gaps = _greedy(loaded, torch.tensor(tokenizer(prompts)["input_ids"]))
        for prompt, tokens, gap in zip(prompts, steps, gaps, strict=True):
            close, end = _first(gap < CLOSE), _first(tokens == tokenizer.eos_token_id)
            most = MOST_TOKENS if end < close else close
            if most:
                texts = [tokenizer.decode([token]) for token in tokens[: min(close, end)].tolist()]
                found.append(Known(prompt, texts, most))
    torch.set_num_threads(threads)
    return found


def _greedy(model: Any, ids: Any) -> tuple[Any, Any]:
    """The best token of each step, and how far the second one is behind it: both [prompts, steps]."""
    import torch

    cache, steps, gaps = None, [], []
    with torch.inference_mode():
        for _ in range(MOST_TOKENS):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            best = output.logits[:, -1].topk(2)
            ids, cache = best.indices[:, :1], output.past_key_values
            steps.append(best.indices[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
    return torch.stack(steps, 1), torch.stack(gaps, 1)


def _first(steps: Any) -> int:
    """The first true one of `steps`; as many as there are, if none is."""
    return int(steps.int().argmax()) if bool(steps.any()) else len(steps)


def write_rows(path: Path, seed: int, known: Sequence[Known]) -> Rows:
    """A file of 1 to 60 rows, of which few to many are bad: all of some rank's, in one of four files."""
    choose = random.Random(f"rows {seed}")
    count = choose.randint(1, 4) if choose.random() < 0.15 else choose.randint(16, 60)
    share, lone = choose.choice((0.0, 0.1, 0.4)), choose.random() < 0.25
    of = choose.choice((2, 3))
    lines: list[str] = []
    errors: dict[int, tuple[int, str]] = {}
    stops = set()
    for row in range(count):
        lines += [""] * (choose.random() < 0.1)  # blank lines are no rows, but count as lines
        if choose.random() < share or (lone and row % of == of - 1):
            text, kind = choose.choice(BAD)
            lines.append(text)
            errors[row] = len(lines), kind
            continue
        one = choose.choice(known)
        most = min(one.most, choose.choice((1, 5, 20, MOST_TOKENS, MOST_TOKENS)))
        columns: dict[str, object] = {"id": f"row-{row}", "prompt": one.prompt, "max_new_tokens": most}
        letters = [token for token in one.tokens[1:most] if token.isalnum() and token.isascii()]
        if letters and choose.random() < 0.2:
            columns["stop"] = choose.choice(letters)
            stops.add(row)
        lines.append(json.dumps(columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Rows(path, count, errors, frozenset(stops))
