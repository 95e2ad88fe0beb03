"""Model folders with damaged files, through all that reads them, and some of them through a load and a generation.

Every seed makes a tiny model's folder and damages a file or two. Either a sentence for the person at the terminal comes
out, which names the folder, or a model that can be used; and no prompt of it has lost a word of its row.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from batchgen import engines, models
from batchgen.engine import Setup
from batchgen.models.tokenizer import HfTokenizer
from batchgen.planning import forecast
from batchgen.planning.hardware import card_of
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.types import Prompt, Row, SamplingParams, UserError
from batchgen.world import World
from tests import mutations
from tests import tiny_models as tiny

_WORDS = "Name 3 colours of THE rainbow quickly"
_ROWS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": _WORDS},
    {"id": "chat", "messages": [{"role": "user", "content": _WORDS}]},
]
_STAND_INS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    b"<!DOCTYPE html><html><body>Not found</body></html>",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b"\x00" * 64,
)
_NUMBERS = (0, -1, -5, 1, 3, 7, 1 << 20, 1 << 40, 10**30, 0.5, -0.5, 1e300, float("inf"), float("nan"))
_FIELDS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]},
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "is_encoder_decoder": True,
    "is_decoder": False,
    "text_config": {},
    "sliding_window": 3,
    "rope_scaling": {"type": "yarn", "factor": 2.0},
    "dtype": "float16",
    "architectures": ["T5ForConditionalGeneration"],
    "chat_template": "{{ messages }}",
    "tokenizer_class": "Qwen2Tokenizer",
    "tie_word_embeddings": True,
    "layer_types": ["full_attention", "nothing"],
}


def case(seed: int, folder: Path) -> str:
    """Makes the folder of `seed` in `folder`, reads it, and checks what came out.

    Raises:
        AssertionError, or whatever has escaped.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    random = Random(seed)
    place = folder / "model"
    _write(place, dict(_files(random.choice(list(_KINDS)), random.random() < 0.2)), random)
    try:
        models.check_there(str(place))
        tokenizer = HfTokenizer(str(place))
    except UserError as error:
        _check_sentence(error, str(place))
        return "refused"
    prompts = _read_rows(tokenizer)
    try:
        _forecast(tokenizer)
    except UserError as error:
        _check_sentence(error, "")
        return "refused by plan"
    if seed % 5:
        return "read"
    try:
        return _generate("paged" if seed % 10 else "accelerate", place, prompts)
    except UserError as error:
        _check_sentence(error, "")
        return "refused by the engine"


_KINDS: dict[str, Callable[..., Any]] = {
    "llama": tiny.llama,
    "bloom": tiny.bloom,
    "qwen3": tiny.qwen3,
    "mistral": tiny.mistral,
}


@cache
def _files(kind: str, shards: bool) -> dict[str, bytes]:
    """The files of a whole model, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = tiny.save(Path(scratch, "model"), _KINDS[kind])
        if shards:
            model = transformers.AutoModelForCausalLM.from_pretrained(whole)
            (whole / "model.safetensors").unlink()
            model.save_pretrained(whole, max_shard_size="30KB")
        if kind == "qwen3":  # as older folders have it
            (whole / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
            (whole / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))
        return {path.name: path.read_bytes() for path in sorted(whole.iterdir())}


def _write(place: Path, files: dict[str, bytes], random: Random) -> None:
    place.mkdir()
    for _ in range(random.choice([1, 1, 1, 2])):
        # Weights are many of the files where there are shards.
        names = [name for name in files if random.random() < (0.3 if name.startswith("model-") else 1)]
        name = random.choice(names)
        damaged = _damage(random, name, files)
        files.pop(name) if damaged is None else files.update({name: damaged})
    for name, content in files.items():
        (place / name).write_bytes(content)
    if random.random() < 0.04:
        _misplace(random, place / random.choice(list(files)))


def _misplace(random: Random, path: Path) -> None:
    """A link to nothing, or a folder, in the place of a file."""
    path.unlink()
    if random.random() < 0.5:
        path.symlink_to("../../blobs/nothing")
    else:
        path.mkdir()


def _damage(random: Random, name: str, files: dict[str, bytes]) -> bytes | None:
    """Another content for the file; None: it is gone."""
    content, draw = files[name], random.random()
    if draw < 0.04:
        return None
    if draw < 0.08:
        return b""
    if draw < 0.12:
        return random.choice(_STAND_INS)
    if draw < 0.15:
        return files[random.choice(list(files))]
    if draw < 0.18:
        return random.choice([b"\xef\xbb\xbf" + content, content.decode("latin-1").encode("utf-16")])
    if draw < 0.24:
        return content[: random.randrange(len(content) + 1)]
    if draw < 0.30:
        lines = content.split(b"\n")
        return b"\n".join(line for line in lines if random.random() < 0.9)
    if draw < 0.45:
        return mutations.mutate(random, content)
    if name.endswith(".json"):
        return _damage_json(random, content)
    if name.endswith(".safetensors"):
        return _damage_header(random, content)
    return mutations.mutate(random, content, most=1)


def _damage_json(random: Random, content: bytes) -> bytes:
    try:
        values = json.loads(content)
    except ValueError:  # damaged before
        return content
    for _ in range(random.choice([1, 1, 2, 4])):
        _change(random, values)
    return json.dumps(values).encode()


def _change(random: Random, values: Any) -> None:
    """Changes one value somewhere in `values`, in place."""
    while isinstance(values, (dict, list)) and values:
        key: Any = random.choice(list(values)) if isinstance(values, dict) else random.randrange(len(values))
        inner = values[key]
        if isinstance(inner, (dict, list)) and inner and random.random() < 0.7:
            values = inner
            continue
        draw = random.random()
        if draw < 0.2:
            del values[key]
        elif draw < 0.3 and isinstance(values, dict):
            name = random.choice(list(_FIELDS))
            values[name] = copy.deepcopy(_FIELDS[name])
        elif draw < 0.7 and isinstance(inner, (int, float)):
            values[key] = random.choice(_NUMBERS)
        elif draw < 0.8:
            values[key] = [inner]
        else:
            values[key] = copy.deepcopy(random.choice(mutations.STRANGE))
        return


def _damage_header(random: Random, content: bytes) -> bytes:
    """Weights whose header has other values, and fits the file again."""
    size = int.from_bytes(content[:8], "little")
    header = _damage_json(random, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _check_sentence(error: UserError, place: str) -> None:
    """One or a few lines that name the folder, and advise nothing that batchgen does not have."""
    text = str(error)
    assert place in text, f"does not name the folder: {text}"
    assert 20 < len(text) < 2000, text
    for word in ("Traceback", "trust_remote_code", "ignore_mismatched_sizes", "use_fast", "pip install git"):
        assert word not in text, text


def _read_rows(tokenizer: HfTokenizer) -> list[Prompt]:
    """The prompts of two rows; none has lost a word, unless the tokenizer says so by its token for what is unknown."""
    rows = [Row(number, "a.jsonl", number + 1, row) for number, row in enumerate(_ROWS)]
    outcomes = PromptReader(Recipe(sampling=SamplingParams(max_new_tokens=4)), tokenizer, {}).read(rows)
    prompts = [outcome for outcome in outcomes if isinstance(outcome, Prompt)]
    hf_tokenizer = tokenizer._hf_tokenizer
    for prompt in prompts:
        text = hf_tokenizer.decode(list(prompt.tokens), clean_up_tokenization_spaces=False).lower()
        lost = [word for word in _WORDS.lower().split() if word not in text]
        known = hf_tokenizer.unk_token_id is None or hf_tokenizer.unk_token_id not in prompt.tokens
        assert not lost or not known, f"{prompt.id} lost {lost}: {text!r}"
    for outcome in outcomes:
        assert isinstance(outcome, Prompt) or (outcome.error is not None and outcome.error.message)
    return prompts


def _forecast(tokenizer: HfTokenizer) -> None:
    model = forecast.Model.of(tokenizer.config, torch.bfloat16)
    forecast.forecasts(model, forecast.Work([(20, 4), (9, 4)], 2), forecast.Node(card_of("A100-80", None), 2), {})


def _generate(name: str, place: Path, prompts: list[Prompt]) -> str:
    """A real load, and a generation of those prompts: each is in one batch."""
    kind = engines.find(name)
    setup = Setup(str(place), "auto", 2, World(size=1, local_size=1), cache=str(place.parent / "cache"))
    with kind(setup, kind.Options()) as made:
        batches = list(made.generate(iter(prompts), lambda: False))
    finished = [generation for batch in batches for generation in batch.generations]
    assert sorted(one.index for one in finished) == sorted(one.index for one in prompts)
    shutil.rmtree(place.parent / "cache", ignore_errors=True)
    return f"generated by {name}"
