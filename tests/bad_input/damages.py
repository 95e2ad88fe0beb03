"""Ways in which a model folder is damaged or odd, and what is said of each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests import tiny_models as tiny

Damage = Callable[[Path], object]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"


def put(name: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(name: str, **fields: Any) -> Damage:
    """Sets fields of a JSON file; `...` takes one out."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | fields
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return edit


def config(**fields: Any) -> Damage:
    return change("config.json", **fields)


def without(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def vocabulary(keep: Callable[[str], bool]) -> Damage:
    """Leaves those tokens of the vocabulary in tokenizer.json that are to be kept."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        tokens = values["model"]["vocab"]
        values["model"]["vocab"] = {token: index for token, index in tokens.items() if keep(token)}
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return edit


def dangling(name: str) -> Damage:
    return lambda folder: [(folder / name).unlink(), (folder / name).symlink_to("../../blobs/4d7a")]


def replaced_by_folder(name: str) -> Damage:
    return lambda folder: [(folder / name).unlink(), (folder / name).mkdir()]


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def renamed(name: str, new: str) -> Damage:
    return lambda folder: (folder / name).rename(folder / new)


def other_types(dtype: str) -> Damage:
    """Names another type of the same size in the header of the weights."""
    return lambda folder: put(
        "model.safetensors", (folder / "model.safetensors").read_bytes().replace(b'"F32"', f'"{dtype}"'.encode())
    )(folder)


# Where a config says which tokenizer, an empty one was made of nothing. These say so with what files.
EMPTY = {
    "Qwen2Tokenizer": r"tokenizer\.json \(or vocab\.json and merges\.txt\) is missing in ",
    "LlamaTokenizer": r"has no vocabulary: tokenizer\.json \(or tokenizer\.model\) is missing",
    "GPT2Tokenizer": r"has no vocabulary: tokenizer\.json \(or vocab\.json and merges\.txt\) is missing",
    "BertTokenizer": r"has no vocabulary: tokenizer\.json \(or vocab\.txt\) is missing",
    "GemmaTokenizer": r"has no vocabulary: tokenizer\.json is missing",
    "T5Tokenizer": r"has no vocabulary: tokenizer\.json .* is missing",
    "GPTNeoXTokenizer": r"has no vocabulary: tokenizer\.json .* is missing",
    "TokenizersBackend": r"there is no tokenizer\.json in ",
}
NEW = {"201": {"content": "<|user|>", "special": True}, "202": {"content": "hello", "special": False}}
NEW = {i: t | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) for i, t in NEW.items()}

KINDS: dict[str, tuple[Damage, str]] = {
    # Tokenizers
    **{
        f"empty {name}": (both(change("tokenizer_config.json", tokenizer_class=name), without("tokenizer.json")), why)
        for name, why in EMPTY.items()
    },
    "only added tokens": (
        both(
            change("tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=NEW),
            without("tokenizer.json"),
        ),
        "has no vocabulary",
    ),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), r"there is no tokenizer\.json in "),
    "no decoder": (change("tokenizer.json", decoder=None), "has no decoder for what it makes of spaces"),
    "no words": (vocabulary(lambda token: token in tiny.SPECIAL), r"no vocabulary: .*tokenizer\.json holds none"),
    "no letters": (vocabulary(lambda token: not token.isascii() or token in tiny.SPECIAL), "leaves every letter"),
    "tokenizer.model alone": (
        both(without("tokenizer.json", "tokenizer_config.json"), put("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>")),
        r"has tokenizer\.model and no tokenizer\.json, and reading that takes the package sentencepiece"
        if find_spec("sentencepiece") is None
        else "the tokenizer of the model in .* cannot be used: ",  # whatever Transformers says of it
    ),
    "tokenizer.json of another kind": (put("tokenizer.json", "{}"), r"tokenizer of the model in .* KeyError"),
    "tokenizer.json as a list": (put("tokenizer.json", "[]"), r"tokenizer\.json holds no JSON object"),
    "tokenizer.json cut off": (cut("tokenizer.json", 500), r"tokenizer\.json is no JSON: line \d+, column \d+"),
    "tokenizer.json empty": (put("tokenizer.json", ""), r"tokenizer\.json is empty"),
    "tokenizer.json in LFS": (put("tokenizer.json", POINTER), r"tokenizer\.json is a pointer of Git LFS"),
    "tokenizer.json a link": (dangling("tokenizer.json"), r"tokenizer\.json is a link to \.\./\.\./blobs/4d7a, and "),
    "tokenizer.json a folder": (replaced_by_folder("tokenizer.json"), r"tokenizer\.json is a folder"),
    "tokenizer_config.json cut off": (cut("tokenizer_config.json", 30), r"tokenizer_config\.json is no JSON: line 3"),
    "tokenizer_config.json as a list": (put("tokenizer_config.json", "[]"), "holds no JSON object"),
    "tokenizer_config.json with a mark": (put("tokenizer_config.json", b"\xef\xbb\xbf{}"), "begins with a byte-order"),
    "an end token that is a number": (change("tokenizer_config.json", eos_token=5), "eos_token has to be either str"),
    "a class that is a number": (change("tokenizer_config.json", tokenizer_class=5), "tokenizer of the model in "),
    "a tokenizer with code": (
        change("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.Own", None]}),
        "tokenizer of the model in .* contains custom code",
    ),
    "special_tokens_map.json": (put("special_tokens_map.json", "[1]"), r"special_tokens_map\.json holds no JSON obj"),
    "added_tokens.json": (put("added_tokens.json", '{"a": "b"}'), "tokenizer of the model in .* TypeError"),
    "a template cut off": (
        put("chat_template.jinja", "{{ bos_token }}\n{% for message in messages %}"),
        r"chat_template\.jinja\) is no Jinja template: line 2: Unexpected end of template",
    ),
    "a template that is a number": (
        both(without("chat_template.jinja"), change("tokenizer_config.json", chat_template=5)),
        r"tokenizer_config\.json: chat_template must be a Jinja template, or a list",
    ),
    "a template in another encoding": (put("chat_template.jinja", b"\xff\xfe{\0"), "tokenizer of the model in .*utf-8"),
    "a template without the message": (
        put("chat_template.jinja", "{% for m in messages %}{{ m.role }}: {{ m.contents }}{% endfor %}"),
        "leaves what the user says out of the text",
    ),
    # config.json and generation_config.json
    "no config": (without("config.json"), r"is not a model folder: it holds no config\.json"),
    "config.json a link": (dangling("config.json"), r"config\.json is a link to .* copy the model with the files"),
    "config.json is no JSON": (put("config.json", '{\n "model_type": "llama",\n}'), r"config\.json is no JSON: line 3"),
    "config.json as a list": (put("config.json", "[]"), r"config\.json holds no JSON object"),
    "config.json a web page": (put("config.json", "<html>"), r"config\.json is a web page"),
    "config.json with a mark": (
        lambda folder: put("config.json", b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())(folder),
        r"config\.json begins with a byte-order mark",
    ),
    "config.json in UTF-16": (
        lambda folder: put("config.json", (folder / "config.json").read_text().encode("utf-16"))(folder),
        r"config\.json cannot be read as text",
    ),
    "no model_type": (config(model_type=...), r"config\.json names no model_type"),
    "a model_type that is a number": (config(model_type=5), "model_type is 5"),
    "an unknown model_type": (config(model_type="llama9"), r"Transformers \d.* does not know model_type 'llama9'"),
    "a model with code": (
        config(model_type="own", auto_map={"AutoConfig": "code.Own"}),
        r"brings code of its own \(auto_map\), which batchgen does not run",
    ),
    "pad_token_id": (config(pad_token_id=260), r"pad_token_id is 260, but the model has 260 tokens \(0 to 259\)"),
    "hidden_act": (config(hidden_act="swiglu_fast"), "hidden_act 'swiglu_fast' is not known"),
    "heads": (config(num_attention_heads=5), r"32\) is not a multiple of the number of attention heads \(5\)"),
    "no heads": (config(num_attention_heads=0), "config of the model in .* cannot be used"),
    "vocab_size 0": (config(vocab_size=0), r"config\.json: vocab_size is 0"),
    "vocab_size null": (config(vocab_size=None), "vocab_size"),
    "vocab_size text": (config(vocab_size="260"), "vocab_size"),
    "a negative size": (config(head_dim=-8), "head_dim is -8, and no model has that"),
    "a huge number": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, and no model has that"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "an end token null": (config(eos_token_id=[2, None]), "eos_token_id"),
    "rope": (config(rope_parameters={"rope_type": "circles"}), "config of the model in .* KeyError: 'circles'"),
    "dtype": (config(dtype="float99"), "float99"),
    "an integer dtype": (config(dtype="int64"), "config of the model in .*dtype"),
    "text_config": (config(text_config=5), r"config\.json: vocab_size must be a whole number, not None"),
    "generation_config.json": (
        put("generation_config.json", '{\n "eos_token_id": 2,\n}\n'),
        r"generation_config\.json is no JSON: line 3, column 1",
    ),
    "generation_config.json as a list": (put("generation_config.json", "[]"), r"generation_config\.json holds no JSON"),
    "an end token that is an object": (
        put("generation_config.json", '{"eos_token_id": {"id": 2}}'),
        r"generation_config\.json: eos_token_id must be a token's number or a list of them, not ",
    ),
    "an unknown quantisation": (config(quantization_config={"quant_method": "own"}), "quant_method 'own'"),
    "a quantisation that is a number": (config(quantization_config=5), "quantization_config must be an object"),
    # Weights
    "no weights": (without("model.safetensors"), "holds no weights"),
    "weights empty": (put("model.safetensors", ""), r"model\.safetensors is empty"),
    "weights in LFS": (put("model.safetensors", POINTER), r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
    "weights a web page": (put("model.safetensors", "<!DOCTYPE html>"), r"model\.safetensors is a web page"),
    "weights cut off": (cut("model.safetensors", 9000), r"model\.safetensors is no whole file of safetensors"),
    "weights a link": (dangling("model.safetensors"), r"model\.safetensors is a link to "),
    "weights a folder": (replaced_by_folder("model.safetensors"), r"model\.safetensors is a folder"),
    "weights of numbers": (other_types("I32"), r"as I32, and config\.json has no quantization_config"),
    "an index of files that are not there": (
        both(
            without("model.safetensors"),
            put("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
        ),
        "1 of its 1 weight files are missing",
    ),
    "an index that is none": (
        both(without("model.safetensors"), put("model.safetensors.index.json", '{"weight_map": [1]}')),
        r"model\.safetensors\.index\.json cannot be read as an index of weight files: weight_map must be an object",
    ),
    "an index of nothing": (
        both(without("model.safetensors"), put("model.safetensors.index.json", '{"metadata": {}, "weight_map": {}}')),
        r"model\.safetensors\.index\.json cannot be read as an index of weight files: weight_map must be an object",
    ),
    "an index of numbers": (
        both(without("model.safetensors"), put("model.safetensors.index.json", '{"weight_map": {"a": 5}}')),
        r"model\.safetensors\.index\.json cannot be read as an index of weight files: weight_map must be an object",
    ),
    **{
        f"an index with the metadata {metadata}": (
            both(renamed("model.safetensors", "a.safetensors"), put("model.safetensors.index.json", index)),
            r'model\.safetensors\.index\.json has no object "metadata", without which Transformers does not read it',
        )
        for metadata, index in {
            "left out": '{"weight_map": {"a": "a.safetensors"}}',
            "null": '{"metadata": null, "weight_map": {"a": "a.safetensors"}}',
            "5": '{"metadata": 5, "weight_map": {"a": "a.safetensors"}}',
        }.items()
    },
    "an index cut off": (
        both(without("model.safetensors"), put("model.safetensors.index.json", '{"weight')),
        r"model\.safetensors\.index\.json is no JSON: line 1",
    ),
    "a .bin that is text": (
        both(without("model.safetensors"), put("pytorch_model.bin", "weights")),
        r"pytorch_model\.bin is no file that torch\.save has written",
    ),
    "a .bin cut off": (
        both(without("model.safetensors"), put("pytorch_model.bin", b"PK\x03\x04 and no end")),
        r"pytorch_model\.bin has no end",
    ),
    # Other kinds of folders
    "adapter beside a model": (
        put("adapter_config.json", '{"peft_type": "LORA"}'),
        r"holds a model and a LoRA adapter \(adapter_config\.json\) beside it",
    ),
}
