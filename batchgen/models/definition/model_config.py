"""The config of a model folder, as Transformers reads it: a language model's that can continue a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from batchgen.models import architectures
from batchgen.models.definition.errors import ModelError, refuse_errors
from batchgen.models.definition.files import check_definition_files, check_json, find_packing, read_json
from batchgen.models.definition.folders import CONFIG, check_model_folder
from batchgen.models.quantised import find_format

# These read a text from both sides unless their config says is_decoder, and each token then sees those behind it.
ENCODERS = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
    }
)
# Numbers that sizes are computed with, and the most that a model can mean: Transformers makes a module for each layer
# and, of some kinds, for each expert, so that a damaged number would never end.
_LARGEST_SIZE, _MOST_LAYERS, _MOST_EXPERTS = 1 << 40, 1000, 10_000
_NEEDED = {"vocab_size": _LARGEST_SIZE, "hidden_size": _LARGEST_SIZE, "num_hidden_layers": _MOST_LAYERS}
_POSITIVE = {
    **dict.fromkeys(("head_dim", "intermediate_size", "max_position_embeddings"), _LARGEST_SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1_000_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _MOST_EXPERTS),
}


def read_config(model: str) -> Any:
    """The Transformers config of the model in folder `model`.

    Raises:
        ModelError: the folder is no model's, or its config is none that a text can be continued with.
    """
    folder = Path(model)
    try:
        check_model_folder(folder)
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror or error}. Look at who may read the model") from error
    check_definition_files(folder)
    return read_config_file(folder / CONFIG, folder)


def read_config_file(path: Path, folder: Path | None = None) -> Any:
    """The Transformers config in the file `path`.

    Args:
        folder: of the model that it belongs to; None: the file stands alone.

    Raises:
        ModelError: as `read_config`.
    """
    place = folder or path
    values = read_json(path) or {}
    _check_type(path, values)
    check_json(path.parent, (path.name,))
    with refuse_errors(f"the config of the model in {place} cannot be used"):
        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        _check_numbers(path, config.get_text_config())
    if not getattr(config, "quantization_config", None) and (packing := find_packing(values)):
        config.quantization_config = packing  # where all look for it
    try:
        find_format(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    check_generates(place, config)
    return config


def _check_type(path: Path, values: Mapping[str, object]) -> None:
    """Whether Transformers has code of its own for the model, and knows how its weights are packed."""
    kind, packing = values.get("model_type"), find_packing(values)
    version = f"Transformers {transformers.__version__}"
    if kind is None:
        raise ModelError(f"{path} names no model_type; take the config.json that belongs to these weights")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: model_type is {kind!r}, and must be a text such as 'llama'")
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in values:
            raise ModelError(
                f"the model of {path} brings code of its own (auto_map), which batchgen does not run, "
                f"and {version} has none for model_type {kind!r}; take a version of the model without code"
            )
        raise ModelError(
            f"{version}, which is installed here, does not know model_type {kind!r} of {path}; a newer "
            "version may, or choose another model"
        )
    if packing is None:
        return
    if not isinstance(packing, dict):
        raise ModelError(f"{path}: quantization_config must be an object, not {packing!r}")
    method = packing.get("quant_method")
    if method is not None and method not in [*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"]:
        raise ModelError(
            f"{path}: the weights are packed by quant_method {method!r} (quantization_config), which "
            f"{version} does not read; take the model in another precision"
        )


def _check_numbers(path: Path, text: Any) -> None:
    for name, most in (_NEEDED | _POSITIVE).items():
        try:
            value = getattr(text, name, None)
        except RuntimeError:
            continue  # so Transformers says that its layers differ in it: Gemma 4
        if value is None and name not in _NEEDED:
            continue
        if isinstance(value, (list, tuple)) and name not in _NEEDED:
            continue  # one a layer
        if type(value) is not int:
            raise ModelError(f"{path}: {name} must be a whole number, not {value!r}")
        if not (1 if name in _NEEDED else 0) <= value <= most and (name, value) != ("max_position_embeddings", -1):
            raise ModelError(f"{path}: {name} is {value}, and no model has that")


def check_generates(model: Path, config: Any) -> None:
    """Whether a model of this config continues texts: a decoder, to which Transformers says what fills a row.

    Args:
        model: what the message names.

    Raises:
        ModelError: it is another kind of model.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(
            f"the model in {model} is an encoder with a decoder ({kind}, config.json says is_encoder_decoder true): it "
            "answers a text and does not continue one, and batchgen runs models that continue; choose another model"
        )
    if kind in ENCODERS and not config.is_decoder:
        raise ModelError(
            f"the model in {model} is an encoder, which cannot continue a text: config.json says is_decoder false "
            f"({kind}); choose another model"
        )
    # A model that sees may look at its prompt in both directions and continue it all the same: PaliGemma.
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise ModelError(
            f"the model in {model} is an encoder, which cannot continue a text: config.json says "
            f"use_bidirectional_attention ({kind}); choose another model"
        )
    if why := architectures.why_refused(config):
        raise ModelError(f"models of type {kind}, as the one in {model} is, are not run: {why}")
    if architectures.auto_class(config) is None:
        raise ModelError(
            f"the model in {model} is of type {kind}, of which Transformers {transformers.__version__} has no causal "
            "language model; choose another model"
        )
