"""Weights of 8 and 4 bits: the formats of checkpoints, and those that are made here.

`weight.QuantisedWeight` is the one form that all of them are read into. `find_format` tells from a model's config which
format its checkpoint has; `checkpoint.Checkpoint` reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from batchgen.models.definition.errors import one_line
from batchgen.models.quantised.awq import Awq
from batchgen.models.quantised.compressed_tensors import CompressedTensors
from batchgen.models.quantised.format import Format, refuse
from batchgen.models.quantised.fp8 import Fp8
from batchgen.models.quantised.gptq import Gptq
from batchgen.models.quantised.mxfp4 import Mxfp4

FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "fp8": Fp8.of,
    "compressed-tensors": CompressedTensors.of,
    "awq": Awq.of,
    "gptq": Gptq.of,
    "mxfp4": Mxfp4.of,
}


def get_settings(config: Any) -> Mapping[str, Any]:
    """Returns what the Transformers config of a model says of its quantisation; nothing if it is not quantised."""
    settings = getattr(config, "quantization_config", None) or {}
    if not isinstance(settings, Mapping):
        settings = settings.to_dict()
    return settings


def find_format(config: Any) -> Format | None:
    """Returns the format in which the checkpoint of a Transformers config is quantised.

    None: it is not, or in one that is left to Transformers.

    Raises:
        ModelError: the format has a detail that is not read; the message names it.
    """
    settings = get_settings(config)
    method = str(settings.get("quant_method"))
    if method not in FORMATS:
        return None
    try:
        return FORMATS[method](settings)
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a number where an object should be, say
        refuse(method, f"settings that cannot be understood ({one_line(error)})")


def has_quantised_weights(config: Any) -> bool:
    """Returns whether the checkpoint of a Transformers config holds quantised weights; its settings may be of its KV
    cache alone.

    Raises:
        ModelError: as `find_format`.
    """
    found = find_format(config)
    return bool(get_settings(config)) if found is None else found.has_weights


def make_plain(config: Any) -> Any:
    """Returns a copy of a Transformers config that says nothing of quantisation."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain
