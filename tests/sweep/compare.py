"""One tiny model through one engine, in batches, against Transformers' own `generate` of each row alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from batchgen import engine
from batchgen.decoding import generation
from batchgen.encoder import HfEncoder
from batchgen.engine import EngineError, Setup
from batchgen.types import Generation, Prompt, SamplingParams
from batchgen.world import World
from tests.sweep.kinds import BEGIN, END, PAD, UNKNOWN, VOCABULARY

ROWS, BATCH = 10, 5
_FIRST_LETTER = 0x4E00  # the tokens' texts, one character each: equal texts are equal tokens


@dataclass(frozen=True)
class Outcome:
    """What became of a kind of model with an engine."""

    word: str  # equal, refused, differs or fails
    detail: str = ""


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with a character for each token."""
    special = {"<pad>": PAD, "<s>": BEGIN, "</s>": END, "<unk>": UNKNOWN}
    letters = {chr(_FIRST_LETTER + number): number for number in range(len(special), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel({**special, **letters}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def prompts() -> list[Prompt]:
    """Rows of 1 to 40 tokens, the longest first as an engine gets them, each with a length of its own to generate."""
    source = random.Random(3)
    lengths = sorted((1, 2, 40, *(source.randrange(3, 40) for _ in range(ROWS - 3))), reverse=True)
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


def alone(model: Any, rows: Sequence[Prompt], encoder: HfEncoder) -> dict[str, Generation]:
    """What Transformers generates for each row without padding, and without anything of ours."""
    model.generation_config = GenerationConfig()  # as an engine has it: nothing that the author of a model sets
    found = {}
    for prompt in rows:
        ids = torch.tensor([list(prompt.tokens)])
        config = GenerationConfig(
            max_new_tokens=prompt.params.max_new_tokens,
            do_sample=False,
            eos_token_id=encoder.end_tokens,
            pad_token_id=encoder.pad_token,
        )
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = output[0, ids.shape[1] :].tolist()
        found[prompt.id] = generation(prompt, tokens, tokens[-1] in encoder.end_tokens, encoder, None)
    return found


def batched(name: str, folder: Path, rows: Sequence[Prompt]) -> dict[str, Generation]:
    """What the engine of that name makes of the rows, the self-test included.

    Raises:
        EngineError: it refuses the model.
    """
    kind = engine.find(name)
    setup = Setup(str(folder), "float32", BATCH, World())
    with kind(setup, kind.Options()) as made:
        return {one.id: one for batch in made.generate(iter(rows), lambda: False) for one in batch.generations}


def compare(name: str, folder: Path, expected: dict[str, Generation]) -> Outcome:
    """What becomes of the model in `folder` with the engine of that name."""
    try:
        found = batched(name, folder, prompts())
    except EngineError as error:
        return Outcome("refused", str(error))
    except Exception as error:  # what else there may be is what the sweep looks for
        return Outcome("fails", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return judge(expected, found)


def judge(expected: dict[str, Generation], found: dict[str, Generation]) -> Outcome:
    """Whether both say the same of every row."""
    wrong = [id for id in expected if _said(found.get(id)) != _said(expected[id])]
    if not wrong:
        return Outcome("equal")
    return Outcome("differs", f"{len(wrong)} of {len(expected)} rows, {wrong[0]} for one: "
                   f"{_said(found.get(wrong[0]))} is not {_said(expected[wrong[0]])}")


def _said(one: Generation | None) -> tuple[object, ...]:
    return () if one is None else (one.text, one.generated_tokens, one.finish_reason)


def varies(expected: dict[str, Generation]) -> bool:
    """Whether the rows say different things, so that a wrong mask would show."""
    texts = {one.text for one in expected.values()}
    letters = set("".join(texts))
    return len(texts) > ROWS // 2 and len(letters) > 12


Build = Callable[[str], Any]
