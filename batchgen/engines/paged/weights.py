"""The weights of a whole model, and what becomes of those that are quantised."""

from __future__ import annotations

from typing import Any

import torch

from batchgen import tensor_parallel
from batchgen.engine import Setup
from batchgen.models import loading
from batchgen.models.quantised import find_format
from batchgen.models.quantised.places import widen_all


def load_whole(setup: Setup, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the whole model on `device`.

    Args:
        config: the Transformers config of the model.
        dtype: that it computes in.

    Raises:
        EngineError: as `loading.load`.
    """
    if find_format(config) is None:
        arguments = {"dtype": dtype, "device_map": {"": str(device)}}
        return loading.load(setup.model, arguments, adapter=setup.adapter)
    model = tensor_parallel.map_model(setup.model, None)
    tensor_parallel.copy_weights(model, setup.model, device, dtype, eight_bits=False)
    prepare_quantised(model)
    return model


def prepare_quantised(model: Any) -> None:
    """Widens the quantised weights of a loaded model, or of a rank's shard: there are no products of them yet."""
    widen_all(model)
