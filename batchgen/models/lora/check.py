"""Whether an adapter fits a model, asked before any weight of the model is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping

from batchgen.models import split_folder
from batchgen.models.definition.build import build_empty
from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import read_json
from batchgen.models.lora.adapter import Adapter, describe, read_adapter
from batchgen.models.lora.places import Places, find_places
from batchgen.models.quantised import find_format

logger = logging.getLogger(__name__)


def check_adapter(name: str, model: Path, tokenizer: Any, *, is_merged: bool = True) -> None:
    """Checks that the adapter in the folder `name` fits the model in folder `model`.

    Args:
        tokenizer: the model's `HfTokenizer`.
        is_merged: it is merged into the weights; otherwise rows name it, and its products are computed beside them.

    Raises:
        ModelError: it cannot; the message says why, and what to do.
    """
    adapter, config = read_adapter(name), tokenizer.config
    if split_folder.read(model) is not None:
        raise ModelError(
            f"{model} is split by rank, and an adapter is merged into whole weights; give the model it was made from"
        )
    if getattr(config, "quantization_config", None) and (is_merged or find_format(config) is None):
        raise ModelError(
            f"the weights in {model} are packed (quantization_config in its config.json), and an adapter is merged "
            "into weights that are not; give the model in bfloat16 (--dtype fp8, int8, int4 and nf4 round what was "
            "merged)"
        )
    _check_tokens(adapter, tokenizer)
    _warn_of_template(adapter, tokenizer)
    place_by_config(adapter, config)


def place_by_config(adapter: Adapter, config: Any) -> Places:
    """Returns where the changes of `adapter` belong in a model of this Transformers config, of which nothing is read.

    Raises:
        ModelError: one does not fit.
    """
    empty = build_empty(config)
    return find_places(adapter, empty, get_model_conversion_mapping(empty))


def _check_tokens(adapter: Adapter, tokenizer: Any) -> None:
    """Raises ModelError if the tokenizer beside the adapter has tokens that the model's has not."""
    listed = (read_json(adapter.folder / "tokenizer.json") or {}).get("added_tokens")
    texts = [str(entry.get("content")) for entry in listed or () if isinstance(entry, dict)]  # type: ignore[attr-defined]
    texts += read_json(adapter.folder / "added_tokens.json") or {}
    lost = tokenizer.find_foreign(texts)
    if lost:
        raise ModelError(
            f"{describe(adapter)} has a tokenizer with tokens that the model's has not: {lost[0]!r} (one of "
            f"{len(lost)}). Merge it with peft into a copy of the model (resize_token_embeddings, merge_and_unload), "
            "save the adapter's tokenizer there, and give that as --model; if the adapter was trained without them, "
            "take the tokenizer's files out of its folder"
        )


def _warn_of_template(adapter: Adapter, tokenizer: Any) -> None:
    """Says that a chat template beside the adapter is not used, if it is not the model's."""
    path = adapter.folder / "chat_template.jinja"
    beside: object = path.read_text(encoding="utf-8") if path.is_file() else None
    if beside is None:
        beside = (read_json(adapter.folder / "tokenizer_config.json") or {}).get("chat_template")
    if not isinstance(beside, str):
        return
    try:
        own = tokenizer.template_text()
    except ValueError:
        own = None
    if own is None or own.strip() != beside.strip():
        logger.warning(
            "the adapter in %s has a chat template that is not the model's, which alone is used. To use it, put it "
            "into a copy of the model's folder, as chat_template.jinja",
            adapter.folder,
        )
