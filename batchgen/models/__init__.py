"""Model names to model folders: the default model, models of the Hugging Face hub, folders.

`pull` is for a machine with internet, a login node say; `resolve` then finds the same files without internet. A hub
model lies in the hub's own cache (HF_HOME, HF_HUB_CACHE), so that models which are there already need no second copy;
the default model lies in batchgen's (`cache_folder`), since it comes as a Python package and is converted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from batchgen.models import hub, split_folder
from batchgen.models.definition.adapter import find_adapter, fingerprint_adapter
from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import check_definition_files
from batchgen.models.folder import Report, check_readable, check_weight_files, explained, fingerprint
from batchgen.models.packaged import DEFAULT, prepare_default
from batchgen.models.search import find_folder

__all__ = [
    "DEFAULT",
    "ModelError",
    "Report",
    "ResolvedAdapter",
    "ResolvedModel",
    "cache_folder",
    "check_adapters",
    "check_there",
    "prepare_default",
    "pull",
    "resolve",
]


NO_ADAPTERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """A LoRA adapter on this machine."""

    folder: str  # absolute
    revision: str  # "sha256:…" over its files


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine."""

    folder: Path  # absolute; what Transformers is given
    name: str  # DEFAULT, ORG/NAME, or the folder's own name
    revision: str  # the commit of a hub model; of any other "sha256:…" over its files. A split model has its origin's
    adapter: str = ""  # the folder of the LoRA adapter that is merged into it, absolute; "": none
    adapter_revision: str = ""  # "sha256:…" over its files
    adapters: Mapping[str, ResolvedAdapter] = field(default_factory=dict)  # that rows may name, by these names

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The folders of the adapters that rows may name, by these names."""
        return {name: adapter.folder for name, adapter in self.adapters.items()}


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where batchgen keeps what it prepared: $BATCHGEN_CACHE, else $XDG_CACHE_HOME/batchgen, else ~/.cache/batchgen.

    Raises:
        ModelError: it is below a home folder, and nobody knows where that is.
    """
    try:
        if environment.get("BATCHGEN_CACHE"):
            return Path(environment["BATCHGEN_CACHE"]).expanduser().absolute()
        # The XDG base directory specification says to ignore a relative path.
        base = Path(environment.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "batchgen"
    except RuntimeError as error:
        raise ModelError(
            "cannot tell where to keep models, for there is no such home folder: set BATCHGEN_CACHE to another folder"
        ) from error


def pull(name: str, cache: Path, report: Report) -> Path:
    """Brings `DEFAULT` or the hub's `ORG/NAME[@REVISION]` onto this machine; its folder.

    Raises:
        ModelError: it cannot be had; the message says why and what to do.
    """
    if name == DEFAULT:
        return prepare_default(cache, report)
    with explained(name):
        return hub.pull(name, report)


def check_there(name: str | None, adapter: str | None = None, adapters: Mapping[str, str] = NO_ADAPTERS) -> None:
    """Whether the model called `name` is on this machine and can be run, or comes with batchgen; loads no weights.

    Args:
        adapter: the folder of a LoRA adapter, which must fit it.
        adapters: those of adapters that rows may name, by these names; they must fit it, too.

    Raises:
        ModelError: it is not here, not whole, or none that batchgen runs; the message says what to do.
    """
    for given in (*([] if adapter is None else [adapter]), *adapters.values()):
        find_adapter(given)
    if name is not None and name != DEFAULT:
        with explained(name):
            folder = find_folder(name)
            _resolved(folder)
        from batchgen.models.tokenizer import HfTokenizer  # imports torch, which a name alone does not need

        check_adapters(adapter, adapters, folder, HfTokenizer(str(folder)))


def check_adapters(adapter: str | None, adapters: Mapping[str, str], folder: Path, tokenizer: Any) -> None:
    """Checks that the model in `folder` can have these adapters; loads no weights.

    Args:
        adapter: the folder of one that is merged into it; None: none.
        adapters: those of adapters that rows may name, by these names.
        tokenizer: the model's `HfTokenizer`.

    Raises:
        ModelError: one does not fit, or cannot be had so; the message says why and what to do.
    """
    if adapter is not None or adapters:
        from batchgen.models import lora  # imports torch, which a model without an adapter does not need here

        if adapter is not None:
            lora.check_adapter(adapter, folder, tokenizer)
        if adapters:
            lora.check_row_adapters(adapters, folder, tokenizer)


def resolve(
    name: str | None,
    cache: Path,
    report: Report,
    adapter: str | None = None,
    adapters: Mapping[str, str] = NO_ADAPTERS,
) -> ResolvedModel:
    """The model called `name`, which must be on this machine; the default model is prepared if it is not.

    `name` is a folder, else `ORG/NAME[@REVISION]` of the hub, else `DEFAULT`; None is the default model. `adapter` is
    the folder of a LoRA adapter that is merged into it, and `adapters` are those of adapters that rows may name;
    whether they fit, `lora.check_adapter` and `lora.check_row_adapters` say.

    Raises:
        ModelError: it is not here, not whole or not readable; the message says how to get it.
    """
    if name is None or name == DEFAULT:
        name = str(prepare_default(cache, report))
    with explained(name):
        model = _resolved(find_folder(name))
    if adapters:
        model = replace(model, adapters={name: _resolve_adapter(folder) for name, folder in adapters.items()})
    if adapter is None:
        return model
    merged = _resolve_adapter(adapter)
    return replace(model, adapter=merged.folder, adapter_revision=merged.revision)


def _resolve_adapter(name: str) -> ResolvedAdapter:
    folder = find_adapter(name)
    return ResolvedAdapter(str(folder), fingerprint_adapter(folder))


def _resolved(folder: Path) -> ResolvedModel:
    try:
        split = split_folder.read(folder)
    except split_folder.SplitError as error:
        raise ModelError(str(error)) from error
    check_definition_files(folder)
    if split is not None:
        check_readable(folder / name for names in split.files for name in names)
        return ResolvedModel(folder, split.model, split.revision)
    check_weight_files(folder)
    snapshot = hub.snapshot_of(folder)
    if snapshot is None:
        return ResolvedModel(folder, folder.name, fingerprint(folder))
    return ResolvedModel(folder, *snapshot)
