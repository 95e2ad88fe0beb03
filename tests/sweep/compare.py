"""A tiny model through each engine, in batches, and Transformers' own `generate` of each row alone, token for token."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from batchgen.engine import Setup
from batchgen.engines import find as find_engine
from batchgen.generation.ends import LENGTH, STOP
from batchgen.generation.results import Ended, make_generation
from batchgen.models import loading
from batchgen.models.tokenizer import HfTokenizer
from batchgen.planning import auto
from batchgen.planning.hardware import Machine, Nodes
from batchgen.planning.work import Work
from batchgen.types import Generation, Prompt, SamplingParams, UserError
from batchgen.world import World
from tests.sweep.kinds import build
from tests.sweep.sizes import BEGIN, END, PAD, UNKNOWN, VOCABULARY

ENGINES = ("accelerate", "ds-zero", "ds-inference", "paged")
_ROWS, _SEEDS = 10, 6

Texts = Mapping[str, Generation]  # by the row's id


@dataclass(frozen=True)
class Outcome:
    """What became of a kind of model with an engine."""

    word: str  # equal, refused, differs or fails
    detail: str = ""


@dataclass(frozen=True)
class Swept:
    """What became of a kind of model."""

    kind: str
    impossible: str = ""  # why there is nothing to compare with; "" if there is
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)  # by engine
    chosen: str = ""  # the engine that --engine auto takes, or what it says instead
    varies: bool = True  # the rows say different things, so that a wrong mask would show

    @property
    def is_wrong(self) -> bool:
        """Whether something must be mended."""
        return any(one.word in ("differs", "fails") for one in self.outcomes.values())


def sweep(kind: str, engines: Sequence[str], folder: Path) -> Swept:
    """Builds a model of that kind in `folder`, and runs it through each engine.

    A model that Transformers builds but cannot generate with, engines must refuse.
    """
    try:
        model = _build(kind, 0, folder)
    except Exception as error:  # of whatever kind: Transformers has hundreds of models
        return Swept(kind, f"not built: {_one_line(error)}")
    impossible, expected = "", None
    try:
        for seed in range(_SEEDS):
            model = _build(kind, seed, folder) if seed else model
            expected = alone(model, rows(), HfTokenizer(str(folder)))
            if varies(expected):
                break
    except UserError as error:
        return Swept(kind, "", dict.fromkeys(engines, Outcome("refused", str(error).replace(str(folder), "FOLDER"))))
    except Exception as error:
        impossible = f"Transformers does not generate with it from text alone: {_one_line(error)}"
    outcomes = {name: compare(name, folder, expected) for name in engines}
    chosen = "" if expected is None else choose(folder)
    return Swept(kind, impossible, outcomes, chosen, expected is None or varies(expected))


def _build(kind: str, seed: int, folder: Path) -> Any:
    model = build(kind, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer in which token N is the ASCII character N, so that equal texts are equal tokens.

    It is byte-level BPE without merges. Of some kinds, Qwen2 for one, Transformers reads a tokenizer.json as nothing
    else: any other vocabulary would be empty there.
    """
    special = {"<pad>": PAD, "<s>": BEGIN, "</s>": END, "<unk>": UNKNOWN}
    letters = {_byte_name(number): number for number in range(len(special), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE({**special, **letters}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def _byte_name(byte: int) -> str:
    """How byte-level BPE writes an ASCII character: as itself if it can be seen, else as one from U+0100 on."""
    return chr(byte) if 33 <= byte <= 126 else chr(256 + byte) if byte < 33 else chr(256 + 33)


def rows() -> list[Prompt]:
    """Rows of 1 to 40 tokens, the longest first as an engine gets them, each with a length of its own to generate."""
    source = random.Random(3)
    lengths = sorted((1, 2, 40, *(source.randrange(3, 40) for _ in range(_ROWS - 3))), reverse=True)
    return [
        Prompt(
            number,
            f"row-{number}",
            number + 1,
            "",
            [BEGIN, *(source.randrange(4, VOCABULARY) for _ in range(length - 1))],
            SamplingParams(max_new_tokens=source.randrange(12, 25)),
            {},
        )
        for number, length in enumerate(lengths)
    ]


def alone(model: Any, prompts: Sequence[Prompt], tokenizer: HfTokenizer) -> Texts:
    """What Transformers generates for each row without padding, and without anything of ours."""
    model.generation_config = GenerationConfig()  # nothing that the author of a model sets besides end tokens
    found = {}
    for prompt in prompts:
        ids = torch.tensor([list(prompt.tokens)])
        config = GenerationConfig(
            max_new_tokens=prompt.params.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.end_tokens,
            pad_token_id=tokenizer.pad_token,
        )
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = output[0, ids.shape[1] :].tolist()
        found[prompt.id] = make_generation(
            Ended(prompt, tokens, STOP if tokens[-1] in tokenizer.end_tokens else LENGTH), tokenizer
        )
    return found


def compare(name: str, folder: Path, expected: Texts | None) -> Outcome:
    """What becomes of the model in `folder` with the engine of that name, the self-test included."""
    kind = find_engine(name)
    try:
        with kind(Setup(str(folder), "float32", None, World()), kind.Options()) as made:
            batches = list(made.generate(iter(rows()), lambda: False))
    except UserError as error:
        return Outcome("refused", str(error).replace(str(folder), "FOLDER"))
    except Exception as error:  # what else there may be is what the sweep looks for
        return Outcome("fails", _one_line(error))
    if expected is None:
        return Outcome("fails", "it gave text to a model that Transformers cannot generate with")
    return judge(expected, {one.id: one for batch in batches for one in batch.generations})


def judge(expected: Texts, found: Texts) -> Outcome:
    """Whether both say the same of every row."""
    wrong = [id for id in expected if id not in found or _said(found[id]) != _said(expected[id])]
    if not wrong:
        return Outcome("equal")
    first = wrong[0]
    said = _said(found[first]) if first in found else "nothing"
    return Outcome(
        "differs", f"in {len(wrong)} of {len(expected)} rows; {first}: {said}, alone {_said(expected[first])}"
    )


def _said(one: Generation) -> tuple[object, ...]:
    return one.text, one.generated_tokens, one.finish_reason


def varies(expected: Texts) -> bool:
    """Whether the rows say different things."""
    texts = {one.text for one in expected.values()}
    return len(texts) > _ROWS // 2 and len(set("".join(text or "" for text in texts))) > 8


def choose(folder: Path) -> str:
    """The engine that `--engine auto` takes for the model in `folder`, on this machine."""
    lengths = [(len(prompt.tokens), prompt.params.max_new_tokens) for prompt in rows()]
    try:
        drawn = Work(lengths, len(lengths))
        return auto.choose_fastest(folder, "float32", (), lambda tokenizer: drawn, Nodes(Machine.here(1), 1)).name
    except Exception as error:
        return _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


loading.prepare_transformers()
