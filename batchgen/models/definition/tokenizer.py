"""The tokenizer of a model folder, with a vocabulary and a chat template that can be used."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from batchgen.models.definition.chat_template import check_chat_template, read_chat_template
from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.files import check_definition_files, check_json

_JSON = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "tekken.json"),
)
# What holds a vocabulary in a form that takes another package to read, and that package.
_PACKAGES = {
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "sentencepiece.bpe.model": "sentencepiece",
    "tiktoken.model": "tiktoken",
}
_SPACES = ("Ġ", "▁")  # how vocabularies write them
_MESSAGE = "Name a colour"
_LETTERS = string.ascii_letters + string.digits
LETTERS = _LETTERS + "éßñøΩжשאعक中あ한"
"""Of many alphabets: a tokenizer that makes tokens of each is taken to lose no letter of any text."""


def read_tokenizer(model: str) -> Any:
    """The Transformers tokenizer of the model in folder `model`.

    Raises:
        ModelError: there is none that this version of Transformers can read with the packages that are installed, it
            has no vocabulary or leaves letters out, or its chat template is none. The message names the file.
    """
    folder = Path(model)
    check_definition_files(folder)
    template = read_chat_template(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        special = {*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab()}
        has_words = any(text not in special and _is_word(text) for text in tokenizer.get_vocab())
        lost = find_lost(tokenizer, _LETTERS)
        pieces: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if getattr(pieces, "dropout", None):  # left over from training: a text would get other tokens each time
            pieces.dropout = None
        tokenizer(_MESSAGE)  # with what is put around a text
    except BaseException as error:  # damaged files, of a format that has grown for years, raise anything
        # What Rust panics with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _explained(folder, error) from error
    if not has_words:
        raise ModelError(f"the tokenizer of the model has no vocabulary: {_find_missing(folder, tokenizer)}")
    if len(lost) == len(_LETTERS):
        raise ModelError(
            f"the tokenizer of the model in {folder} leaves every letter and digit out of a text: its vocabulary is "
            "not whole; copy the model again"
        )
    if any(mark in _decode_again(tokenizer) for mark in _SPACES):
        raise ModelError(
            f"the tokenizer of the model in {folder} has no decoder for what it makes of spaces: texts would come out "
            f"as {_decode_again(tokenizer)!r}; copy tokenizer.json again"
        )
    tokenizer.chat_template = tokenizer.chat_template or template
    if isinstance(tokenizer.chat_template, str):  # an editor's mark would be the beginning of each prompt
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    check_chat_template(folder, tokenizer)
    return tokenizer


def _decode_again(tokenizer: Any) -> str:
    tokens = tokenizer(_MESSAGE, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def find_lost(tokenizer: Any, letters: str) -> str:
    """Those of `letters` of which the tokenizer makes no token at all, not even one for what is unknown."""
    tokens = tokenizer(list(letters), add_special_tokens=False)["input_ids"] if letters else []
    return "".join(letter for letter, ids in zip(letters, tokens, strict=True) if not ids)


def _is_word(text: object) -> bool:
    """Whether an entry of a vocabulary stands for a part of a text, and not for a space or a mark like <s> or [PAD]."""
    word = str(text).replace("▁", "").strip()
    return bool(word) and not (len(word) > 2 and word[0] + word[-1] in ("<>", "[]") and word[1:-1].strip("<>[]|"))


def _find_missing(folder: Path, tokenizer: Any) -> str:
    """Which file should have held the vocabulary."""
    if (folder / "tokenizer.json").exists():
        return f"{folder / 'tokenizer.json'} holds none; copy the model again"
    names = [name for key, name in type(tokenizer).vocab_files_names.items() if key != "tokenizer_file" and name]
    package = _find_package(folder)
    if package is not None:
        return package
    other = f" (or {' and '.join(names)})" if names else ""
    return f"tokenizer.json{other} is missing in {folder}; copy the model again"


def _find_package(folder: Path) -> str | None:
    """Which package is missing to read a tokenizer that is there in another form alone; None: there is no such form."""
    if (folder / "tokenizer.json").exists():
        return None
    for name, package in _PACKAGES.items():
        if (folder / name).exists() and importlib.util.find_spec(package) is None:
            return (
                f"{folder} has {name} and no tokenizer.json, and reading that takes the package {package}, which is "
                "not installed; take a version of the model with tokenizer.json, or install the package"
            )
    return None


def _explained(folder: Path, error: BaseException) -> ModelError:
    """What is wrong with the files of a tokenizer that could not be read."""
    check_json(folder, _JSON)
    package = _find_package(folder)
    if package is None and not any((folder / name).exists() for name in ("tokenizer.json", *_PACKAGES, "tekken.json")):
        package = f"there is no tokenizer.json in {folder}; copy the model again"
    why = package or one_line(error)
    return ModelError(f"the tokenizer of the model in {folder} cannot be used: {why}")
