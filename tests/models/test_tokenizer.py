"""Text to tokens and back, with tokenizers saved to model folders."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from batchgen.engine import EngineError, Setup
from batchgen.models import tokenizer as definition
from batchgen.models.tokenizer import HfTokenizer, tokenizer_of
from batchgen.world import World
from tests import tiny_models as models

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def folder_with(config: dict[str, Any], base: Path, folder: Path) -> Path:
    """A copy of `base`, without weights, whose config has other values; None takes one out."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    values = json.loads((folder / "config.json").read_text()) | config
    values = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_chat_is_rendered_for_the_assistants_turn(tiny_llama: Path) -> None:
    text = HfTokenizer(str(tiny_llama)).chat(MESSAGES)
    assert text == "<s><|system|>Be brief.</s><|user|>Hi</s><|assistant|>"


def test_template_arguments_are_passed_on_but_the_result_stays_a_text(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    assert tokenizer.chat(MESSAGES[1:], add_generation_prompt=False, tokenize=True) == "<s><|user|>Hi</s>"


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ([{"role": "wizard", "content": "x"}], "role wizard is not known"),
        ([{"role": ["user"], "content": "x"}], "refused"),
        ([{"content": "x"}], "refused"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_a_value_error(
    tiny_llama: Path, messages: list[dict[str, object]], detail: str
) -> None:
    with pytest.raises(ValueError, match=detail):
        HfTokenizer(str(tiny_llama)).chat(messages)


def test_a_model_without_a_template_says_so(tiny_bloom: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        HfTokenizer(str(tiny_bloom)).chat(MESSAGES)


def test_a_plain_text_gets_one_beginning_token_and_a_rendered_chat_none(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    plain, begun = tokenizer.tokenize(["Hi", "<s>Hi"], special=True)
    assert plain == begun
    assert plain[0] == models.BEGIN
    assert models.BEGIN not in plain[1:]
    (chat,) = tokenizer.tokenize([tokenizer.chat(MESSAGES)], special=False)
    assert list(chat).count(models.BEGIN) == 1


def test_tokens_are_plain_lists_one_a_text(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    tokens = tokenizer.tokenize(["a", "", "é"], special=False)
    assert [len(each) for each in tokens] == [1, 0, 2]
    assert all(type(each) is list and all(type(i) is int for i in each) for each in tokens)
    assert tokenizer.tokenize([], special=True) == []


def test_a_lone_surrogate_does_not_spoil_the_window_it_is_in(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    broken, whole = tokenizer.tokenize(["a\ud800b", "ab"], special=False)
    assert tokenizer.decode(broken) == "a\ufffdb"
    assert tokenizer.decode(whole) == "ab"


def test_a_token_has_a_text_of_its_own(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    (tokens,) = tokenizer.tokenize([" aé"], special=False)
    assert [tokenizer.token_text(token) for token in [*tokens, models.END]] == [" ", "a", "\udcc3", "\udca9", "</s>"]


def test_long_texts_are_tokenized_without_a_warning(tiny_llama: Path, tmp_path: Path) -> None:
    folder = folder_with({}, tiny_llama, tmp_path / "short")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 16}))
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        (tokens,) = HfTokenizer(str(folder)).tokenize(["x" * 2000], special=False)
    finally:
        logger.removeHandler(handler)
    assert len(tokens) == 2000
    assert [record.getMessage() for record in seen] == []


@pytest.mark.parametrize("text", [" leading", "trailing \n", "a , b . c 's", "日本語 🙂", "\n\n  x"])
def test_decoding_gives_back_every_space(tiny_llama: Path, text: str) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    (tokens,) = tokenizer.tokenize([text], special=False)
    assert tokenizer.decode([*tokens, models.END]) == text


def test_the_first_tokens_leading_space_survives_a_decoder_that_drops_it(tiny_llama: Path, tmp_path: Path) -> None:
    folder = folder_with({}, tiny_llama, tmp_path / "sentencepiece")
    models.sentencepiece_like_tokenizer().save_pretrained(folder)
    tokenizer = HfTokenizer(str(folder))
    (tokens,) = tokenizer.tokenize(["good day"], special=False)
    assert tokenizer.decode(tokens) == " good day"
    assert tokenizer.decode([]) == ""


class OwnWay(PreTrainedTokenizerFast):
    """A class of some model, which does its own around the tokenizer: nothing."""

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(*args, **kwargs)

    def _decode(self, *args: Any, **kwargs: Any) -> str:
        return super()._decode(*args, **kwargs).replace("shout", "SHOUT")


def read_in_its_own_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> HfTokenizer:
    """The tokenizer of a model whose class calls Transformers for each text."""
    monkeypatch.setattr(definition, "read_tokenizer", OwnWay.from_pretrained)
    return HfTokenizer(str(folder))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
def test_texts_and_tokens_of_many_are_those_of_transformers_for_each(
    kind: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with({}, tiny_llama, tmp_path / "model")
    if kind == "sentencepiece-like":
        models.sentencepiece_like_tokenizer().save_pretrained(folder)
    quick, other = HfTokenizer(str(folder)), read_in_its_own_way(folder, monkeypatch)
    texts = ["", " ", "a", "good day", " good  day .", "<s>a</s>", "日本 é", "a\ud800b", "é" * 99]
    for special in (True, False):
        assert quick.tokenize(texts, special=special) == other.tokenize(texts, special=special)
    choose = random.Random(1)
    rows = [choose.choices(range(300), k=length) for length in (0, 1, 1, 2, 3, 5, 9, 40) for _ in range(9)]
    for skips in (True, False):
        expected = [other.decode(tokens, skip_special_tokens=skips) for tokens in rows]
        assert quick.decode_all(rows, skip_special_tokens=skips) == expected
        assert [quick.decode(tokens, skip_special_tokens=skips) for tokens in rows] == expected


def test_a_tokenizer_whose_class_decodes_in_its_own_way_is_asked(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = read_in_its_own_way(tiny_llama, monkeypatch)
    (tokens,) = tokenizer.tokenize(["shout"], special=False)
    assert tokenizer.decode_all([tokens]) == ["SHOUT"] == [tokenizer.decode(tokens)]


def test_an_engine_takes_the_tokenizer_of_the_rows_where_threads_can_share_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(str(tiny_llama), "float32", None, World())
    assert isinstance(tokenizer_of(setup), HfTokenizer)
    quick = HfTokenizer(str(tiny_llama))
    assert tokenizer_of(replace(setup, tokenizer=quick)) is quick
    other = read_in_its_own_way(tiny_llama, monkeypatch)
    assert tokenizer_of(replace(setup, tokenizer=other)) is not other


def test_threads_share_a_tokenizer(tiny_llama: Path) -> None:
    tokenizer = HfTokenizer(str(tiny_llama))
    texts = [f"{number} é " * (number % 50) for number in range(500)]
    tokens = tokenizer.tokenize(texts, special=False)

    def work(number: int) -> bool:
        if number % 3 == 0:
            return tokenizer.tokenize(texts, special=False) == tokens
        if number % 3 == 1:
            return tokenizer.decode_all(tokens) == texts
        return [tokenizer.decode(each) for each in tokens] == texts and not tokenizer.find_lost(texts[number])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(60)))


def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer_together(tiny_llama: Path, tmp_path: Path) -> None:
    folder = folder_with({"eos_token_id": [7, 9]}, tiny_llama, tmp_path / "ends")
    assert HfTokenizer(str(folder)).end_tokens == [models.END, 7, 9]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": models.END_OF_TURN}))
    assert HfTokenizer(str(folder)).end_tokens == [models.END, models.END_OF_TURN, 7, 9]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [models.END_OF_TURN, None]}))
    assert HfTokenizer(str(folder)).end_tokens == [models.END, models.END_OF_TURN, 7, 9]


def test_padding_is_no_end_token_and_lies_in_the_embedding(tiny_llama: Path, tiny_bloom: Path, tmp_path: Path) -> None:
    assert HfTokenizer(str(tiny_llama)).pad_token == models.PAD
    ends = folder_with({"eos_token_id": [0, 1, 2]}, tiny_llama, tmp_path / "ends")
    assert HfTokenizer(str(ends)).pad_token == 3
    # BLOOM's embedding needs no padding of its own: it is made all the same.
    outside = folder_with({"pad_token_id": 260}, tiny_bloom, tmp_path / "outside")
    settings = json.loads((outside / "tokenizer_config.json").read_text()) | {"pad_token": "<outside>"}
    (outside / "tokenizer_config.json").write_text(json.dumps(settings))
    assert HfTokenizer(str(outside)).pad_token < 260


@pytest.mark.parametrize(
    ("config", "context"),
    [({"max_position_embeddings": 77}, 77), ({"max_position_embeddings": -1}, None)],
)
def test_the_context_is_what_the_config_says(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], context: int | None
) -> None:
    tokenizer = HfTokenizer(str(folder_with(config, tiny_llama, tmp_path / "model")))
    assert (tokenizer.context, tokenizer.vocabulary) == (context, 260)


def test_bloom_has_no_limit_unless_its_config_names_one(tiny_bloom: Path, tmp_path: Path) -> None:
    assert HfTokenizer(str(tiny_bloom)).context is None
    assert HfTokenizer(str(folder_with({"seq_length": 2048}, tiny_bloom, tmp_path / "bloom"))).context == 2048


@pytest.mark.parametrize(
    ("whole", "part", "generation", "ends"),
    [
        (None, 9, None, [2, 9]),
        (7, 9, None, [2, 7]),
        (None, 9, 8, [2, 8]),
        (7, 9, [8, 6], [2, 6, 7, 8]),
    ],
)
def test_the_text_part_of_a_model_that_sees_says_where_texts_end_if_nobody_else_does(
    tiny_llama: Path, tmp_path: Path, whole: int | None, part: int, generation: object, ends: list[int]
) -> None:
    text = json.loads((tiny_llama / "config.json").read_text()) | {"eos_token_id": part, "vocab_size": 250}
    config = {"model_type": "llava", "text_config": text, "eos_token_id": whole, "vocab_size": None}
    folder = folder_with(config, tiny_llama, tmp_path / "sees")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = HfTokenizer(str(folder))
    assert (tokenizer.end_tokens, tokenizer.vocabulary, tokenizer.context) == (ends, 250, 512)


@pytest.mark.parametrize("kind", ["codegen", "cpmant", "qwen3_vl"])
def test_a_config_that_has_no_field_for_special_tokens_is_read(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_llama / "tokenizer_config.json", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    tokenizer = HfTokenizer(str(folder))
    assert 2 in tokenizer.end_tokens
    assert tokenizer.pad_token == 0


def test_a_folder_without_a_model_is_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"holds no config\.json"):
        HfTokenizer(str(tmp_path / "missing"))
    strange = folder_with({"model_type": "unheard_of"}, tiny_llama, tmp_path / "strange")
    with pytest.raises(EngineError, match="unheard_of"):
        HfTokenizer(str(strange))
    painter = folder_with({"model_type": "blip"}, tiny_llama, tmp_path / "painter")
    with pytest.raises(EngineError, match=r"models of type blip.* Transformers generates with it from a picture alone"):
        HfTokenizer(str(painter))
    mute = folder_with({}, tiny_llama, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(mute / name)
    with pytest.raises(EngineError, match="tokenizer"):
        HfTokenizer(str(mute))
