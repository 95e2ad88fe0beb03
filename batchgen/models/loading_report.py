"""What Transformers reports of a load: whether the files hold the model, and no more layers than its config says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchgen.models.definition.errors import ModelError


def check_report(model: str, config: Any, report: Mapping[str, Any]) -> None:
    """Raises ModelError if the files lack weights of the model, or hold more layers than its config says."""
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights in {model} are not complete: {missing[0]} (one of {len(missing)}) is missing; "
            "copy or download the model again"
        )
    text = config.get_text_config()
    # Layers behind the last, which guess several tokens at once, are left out by design.
    layers = text.num_hidden_layers + (getattr(text, "num_nextn_predict_layers", None) or 0)
    beyond = [name for name in sorted(report["unexpected_keys"]) if _layer_of(name) >= layers]
    if beyond:
        raise ModelError(
            f"the weights in {model} hold more layers than its config.json says: {beyond[0]} (one of {len(beyond)}) "
            f"has no place among num_hidden_layers {text.num_hidden_layers}; take the config.json that belongs to them"
        )


def _layer_of(name: str) -> int:
    """The number of the layer that a weight is of, from 0; -1: of none."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    return int(found[1]) if found else -1
