"""A model folder with something wrong in it: one sentence, which names the file and the field."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, T5Config

from batchgen import engines, models
from batchgen.engine import Setup
from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.model_config import ENCODERS, read_config
from batchgen.models.tokenizer import HfTokenizer
from batchgen.requests.prompts import PromptReader
from batchgen.requests.recipe import Recipe
from batchgen.types import Generation, Prompt, Row, UserError
from batchgen.world import World
from tests.bad_input.damages import KINDS, Damage, both, config, put, vocabulary, without


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_a_folder_is_a_sentence_before_anything_is_loaded(kind: str, folder: Path) -> None:
    damage, sentence = KINDS[kind]
    damage(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        models.check_there(str(folder))
    assert str(folder) in str(refused.value)
    for word in ("\n", "trust_remote_code", "huggingface.co"):
        assert word not in str(refused.value)


ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "it is empty"),
        (
            [("adapter_config.json", ADAPTER)],
            r"a LoRA adapter of org/base \(adapter_config\.json\): give it as --adapter",
        ),
        ([("adapter_config.json", "{}")], r"is an adapter \(adapter_config\.json\): merge it first"),
        ([("model-Q4_K_M.gguf", "GGUF")], "but GGUF files"),
        ([("params.json", "{}"), ("consolidated.00.pth", "")], "in its maker's own layout"),
        ([("model_index.json", "{}")], "a pipeline that makes images"),
        ([("checkpoint-500/config.json", "{}")], "but its folder checkpoint-500 does; give that one"),
        ([("a/config.json", "{}"), ("b/config.json", "{}")], "but its folders a, b do; give one of them"),
        ([("models--org--name/refs/main", "")], "but 1 models of the hub's cache; give one of them: models--org--name"),
    ],
)
def test_a_folder_that_is_no_models_is_told_what_it_is(
    files: list[tuple[str, str]], sentence: str, tmp_path: Path
) -> None:
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for read in (models.check_there, read_config):
        with pytest.raises(ModelError, match=sentence):
            read(str(tmp_path))


def test_a_file_is_no_folder(folder: Path) -> None:
    (folder / "model.gguf").touch()
    for name, sentence in (("config.json", "is a file; --model takes the folder"), ("model.gguf", "is a GGUF file")):
        with pytest.raises(ModelError, match=sentence):
            models.check_there(str(folder / name))
    (folder / "link").symlink_to("nowhere")
    with pytest.raises(ModelError, match="link is a link to nowhere"):
        models.check_there(str(folder / "link"))


def test_a_folder_of_the_hubs_cache_stands_for_its_snapshot(tiny_llama: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--name"
    snapshots = [cached / "snapshots" / (letter * 40) for letter in "ab"]
    shutil.copytree(tiny_llama, snapshots[0])
    found = models.resolve(str(cached), tmp_path, print)
    assert (found.folder, found.name, found.revision) == (snapshots[0], "org/name", "a" * 40)
    shutil.copytree(tiny_llama, snapshots[1])
    with pytest.raises(ModelError, match=f"2 snapshots; give one of them: {snapshots[0]}, {snapshots[1]}"):
        models.resolve(str(cached), tmp_path, print)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b" * 40)
    assert models.resolve(str(cached), tmp_path, print).folder == snapshots[1]
    for snapshot in snapshots:
        (snapshot / "config.json").unlink()
    with pytest.raises(ModelError, match="without a whole snapshot"):
        models.resolve(str(cached), tmp_path, print)


def test_tekken_json_alone_is_read(folder: Path) -> None:
    byte_tokens = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    about = {"pattern": r"\w+|\W+", "num_vocab_tokens": 259, "default_vocab_size": 259, "default_num_special_tokens": 3}
    tekken = {"config": about | {"version": "v3"}, "vocab": byte_tokens, "special_tokens": special}
    both(without("tokenizer.json", "tokenizer_config.json"), put("tekken.json", json.dumps(tekken)))(folder)
    tokenizer = HfTokenizer(str(folder))
    (tokens,) = tokenizer.tokenize(["Hi you"], special=False)
    assert tokenizer.decode(tokens) == "Hi you"


def test_a_letter_that_the_tokenizer_would_leave_out_is_an_error_of_its_row(folder: Path) -> None:
    vocabulary(lambda token: token != "H")(folder)
    texts = ("Hello there", "hello THere", "hello there")
    rows = [Row(number, "a.jsonl", number + 1, {"prompt": text}) for number, text in enumerate(texts)]
    *lost, good = PromptReader(Recipe(), HfTokenizer(str(folder)), {}).read(rows)
    assert isinstance(good, Prompt)
    for outcome in lost:
        assert isinstance(outcome, Generation)
        assert outcome.error is not None
        assert outcome.error.type == "lost_letters"
        assert 'the model\'s tokenizer has no token for "H" and leaves it out' in outcome.error.message


def test_a_text_has_the_same_tokens_each_time_though_training_has_left_a_dropout(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= {"dropout": 1.0, "merges": [["H", "i"]]}
    values["model"]["vocab"]["Hi"] = 260
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (tokens,) = HfTokenizer(str(folder)).tokenize(["Hi"], special=False)
    assert tokens == [260]


def load(folder: Path) -> None:
    kind = engines.find("accelerate")
    kind(Setup(str(folder), "auto", 2, World(size=1, local_size=1)), kind.Options()).close()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (config(vocab_size=200), r"model\.embed_tokens\.weight is \[260, 32\], and should be \[200, 32\]|lm_head"),
        (
            config(num_hidden_layers=1),
            r"more layers than its config\.json says: model\.layers\.1\..* num_hidden_layers 1",
        ),
        (config(num_hidden_layers=3), r"not complete: model\.layers\.2\..* is missing"),
        (config(quantization_config={"quant_method": "awq"}), "says awq, and no tensor in the files"),
        (
            both(without("model.safetensors"), put("pytorch_model.bin", b"\x80\x02 no pickle")),
            r"cannot be loaded: .*pytorch_model",
        ),
    ],
)
def test_what_a_load_finds_wrong_is_a_sentence(damage: Damage, sentence: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=sentence) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert "ignore_mismatched_sizes" not in str(refused.value)


SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            BertConfig(**SMALL),
            r"is an encoder, which cannot continue a text: config\.json says is_decoder false \(bert\)",
        ),
        (T5Config(vocab_size=260), r"is an encoder with a decoder \(t5"),
        (AutoConfig.for_model("bart", vocab_size=260), r"is an encoder with a decoder \(bart"),
        (AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (AutoConfig.for_model("wav2vec2"), "has no causal language model"),
    ],
    ids=["bert", "t5", "bart", "gemma", "wav2vec2"],
)
def test_a_model_that_does_not_continue_texts_is_refused(made: Any, sentence: str, folder: Path) -> None:
    (folder / "config.json").write_text(made.to_json_string(use_diff=False))
    with pytest.raises(ModelError, match=sentence):
        read_config(str(folder))


def test_encoders_are_those_whose_tokens_see_the_ones_behind_them() -> None:
    """Of all kinds of which Transformers makes causal models and whose configs can say `is_decoder`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    asked = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            made = kind()
        except Exception:  # some are of parts that must be given
            continue
        # Reformer's model refuses by itself to be made.
        if getattr(made, "is_decoder", None) is False and not made.is_encoder_decoder and kind.model_type != "reformer":
            asked[kind.model_type] = kind
    assert asked.keys() >= ENCODERS
    for name in asked:
        assert (name in ENCODERS) == looks_ahead(name), name


def looks_ahead(name: str) -> bool:
    """Whether the first logits of a tiny random model of that kind change with the last token."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    language = {"default_language": "en_XX"} if name == "xmod" else {}
    made = AutoConfig.for_model(name, **SMALL, **language, max_position_embeddings=64, pad_token_id=0, is_decoder=False)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(made, trust_remote_code=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        one, other = model(ids).logits[:, 0]
    return not torch.allclose(one, other, atol=1e-4)


def test_words_of_libraries_are_one_line_without_advice_that_leads_nowhere() -> None:
    assert one_line(ValueError("Is\n bad.\nPlease pass `trust_remote_code=True` to allow it.")) == "Is bad"
    assert one_line(KeyError("swiglu")) == "KeyError: 'swiglu'"
    assert one_line(AssertionError()) == "AssertionError"
    assert len(one_line(OSError("x" * 5000))) < 500
