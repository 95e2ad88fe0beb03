"""The small files of a model folder: whether each is there, can be read, and holds what its name says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from batchgen.models.definition.errors import ModelError

# All of a model that changes what it generates, but its weights.
DEFINITION = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
_MARK = b"\xef\xbb\xbf"
_POINTER = b"version https://git-lfs"
_AGAIN = "copy it again from where the model came from"


def describe_stand_in(begin: bytes) -> str | None:
    """What a file is that begins like this, if it only stands in the place of the one that is meant."""
    if not begin:
        return f"is empty; {_AGAIN}"
    if begin.startswith(_POINTER):
        return "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder, or download it again"
    if begin.removeprefix(_MARK).lstrip()[:1] == b"<":
        return f"is a web page, not the file itself; {_AGAIN}"
    return None


def check_file(path: Path) -> bool:
    """Whether there is a file `path`; what is there must be a file that can be opened.

    Raises:
        ModelError: it is a link to nothing, a folder, or may not be read.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise ModelError(
                f"{path} is a link to {path.readlink()}, and there is no such file; copy the model with the files that "
                "its links point to (cp -L, rsync -L)"
            )
        if not path.exists():
            return False
        if not path.is_file():
            raise ModelError(f"{path} is {'a folder' if path.is_dir() else 'no file'}, and must be a file; {_AGAIN}")
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}. Look at who may read the model") from error
    return True


def check_definition_files(folder: Path) -> None:
    """Whether those files of `DEFINITION` that are in `folder` can be read; their content is not looked at.

    Raises:
        ModelError: as `check_file`.
    """
    for name in DEFINITION:
        check_file(folder / name)


def read_json(path: Path) -> dict[str, object] | None:
    """The JSON object in the file `path`; None if there is no such file.

    Raises:
        ModelError: it cannot be read, or is no JSON object. The message names the file and the line.
    """
    if not check_file(path):
        return None
    try:
        content = path.read_bytes()
        stand_in = describe_stand_in(content[:1000])
        if stand_in is not None:
            raise ModelError(f"{path} {stand_in}")
        values = json.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}. Look at who may read the model") from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}. Mend the file, or {_AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as text: {error}; {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object; {_AGAIN}")
    return values


def check_json(folder: Path, names: tuple[str, ...]) -> None:
    """Whether those of the files `names` that are in `folder` hold JSON objects as Transformers reads them.

    Raises:
        ModelError: as `read_json`; or a file begins with a byte-order mark.
    """
    for name in names:
        if read_json(folder / name) is not None and (folder / name).read_bytes().startswith(_MARK):
            raise ModelError(
                f"{folder / name} begins with a byte-order mark, which Transformers does not read; save it as UTF-8 "
                "without one"
            )


def find_packing(values: Mapping[str, object]) -> object:
    """Returns the `quantization_config` in the values of a config.json; None: it has none.

    That of a model which also sees may stand in the config of its language part.
    """
    text = values.get("text_config")
    inside = text.get("quantization_config") if isinstance(text, dict) else None
    return values.get("quantization_config") or inside
