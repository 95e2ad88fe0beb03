"""Models of the Hugging Face hub, in the hub's own cache folder.

Where that is, which server is asked and with which token, is up to huggingface_hub's own variables (HF_HOME,
HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). No token and no address of a file gets into a message: addresses
of downloads are signed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import DEFINITION
from batchgen.models.folder import WEIGHTS, Report, indexed, weight_files

_NAME = re.compile(r"(?P<model>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./+-]*))?", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?P<organization>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})", re.ASCII)
# What is fetched besides weights: small, so that other kinds of tokenizer are had too, and the indexes of weights.
_SMALL = [*DEFINITION, "*.tiktoken", "*.model", "LICENSE*", *(name for name in WEIGHTS if name.endswith(".json"))]


def pull(name: str, report: Report) -> Path:
    """Fetches what is needed of `ORG/NAME[@REVISION]`; its snapshot folder, `…/snapshots/<commit>`.

    Definition, tokenizer and weights: safetensors, or `pytorch_model.bin` where the model has no safetensors. What is
    there already is not fetched again. `find` gets the same folder by the same name later, without internet.

    Raises:
        ModelError: it cannot be had; the message says why and what to do.
        ValueError: the hub allows no such name.
    """
    model, revision = _parse(name)
    # What is to be ignored: "*.model" also matches those of subfolders (original/tokenizer.model).
    folder = _fetch(model, revision, _SMALL, ignored=["*/*"])
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model for Transformers: it holds no config.json")
    report(f"pulling {name}, commit {folder.name}")
    # By its commit from here on, so that all files are of one revision even if somebody pushes another meanwhile.
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        _fetch(model, folder.name, indexed(index) if index.is_file() else [kind])
        if index.is_file() or (folder / kind).is_file():
            break
    weight_files(folder)
    return folder


def find(name: str) -> Path:
    """The snapshot folder of `ORG/NAME[@REVISION]` in the cache; never asks the hub.

    Raises:
        ModelError: it is not there, or not whole; the message says how to get it.
        ValueError: the hub allows no such name.
        OSError: the cache cannot be read.
    """
    from huggingface_hub import try_to_load_from_cache

    model, revision = _parse(name)
    # Not snapshot_download(local_files_only=True): it refuses a snapshot that lacks the files `pull` left out.
    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        raise ModelError(f"{name} is not on this machine. On a node with internet run: batchgen pull {name}")
    folder = Path(config).parent
    try:
        weight_files(folder)
    except ModelError as error:
        raise ModelError(f"{error}. On a node with internet run: batchgen pull {name}") from error
    return folder


def snapshot_of(folder: Path) -> tuple[str, str] | None:
    """(ORG/NAME, commit) of a snapshot folder of the hub's cache; None for any other folder."""
    found = _SNAPSHOT.search(folder.as_posix())
    if found is None or found.end() != len(folder.as_posix()):
        return None
    return f"{found['organization']}/{found['name']}", found["commit"]


def _parse(name: str) -> tuple[str, str | None]:
    found = _NAME.fullmatch(name)
    # Names with "--" or ".." are the hub's own exceptions: its cache could not keep them apart.
    if found is None or "--" in found["model"] or ".." in name:
        raise ModelError(f"there is no folder {name!r} here, and a hub model is named ORG/NAME or ORG/NAME@REVISION")
    return found["model"], found["revision"]


def _fetch(model: str, revision: str | None, patterns: list[str], ignored: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # OSError and the HTTP library's own error (httpx or httpx2, by the version of huggingface_hub), and what hf_xet,
    # the hub's fast transfer, raises.
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, RuntimeError))
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except failures as error:
        raise ModelError(_sentence(model, revision, error)) from error


def _sentence(model: str, revision: str | None, error: Exception) -> str:
    """What went wrong with a download and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE:
        return f"cannot fetch {model}: HF_HUB_OFFLINE is set. Unset it on a node with internet"
    if isinstance(error, errors.GatedRepoError):
        return f"{model} asks its users to accept its terms: do so at {host}/{model}, then set HF_TOKEN to your token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision!r} at {host}: give one of its branches, tags or commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no model {model} at {host}, or it is private: check the name; for a private model set HF_TOKEN "
            "to a token that may read it"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        advice = "Wait some minutes; a token in HF_TOKEN raises the limit" if status == 429 else "Try again later"
        return f"{host} did not hand out {model}: HTTP status {status}. {advice}"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        where = error.filename or constants.HF_HUB_CACHE
        return f"cannot write {model} to {where}: {error.strerror}. HF_HOME names another folder for models"
    return (
        f"cannot reach {host} to fetch {model} ({type(error).__name__}). Compute nodes often have no internet: "
        "pull on a login node"
    )
