"""Random weights for hollow models: folders whose weight files are empty, made to measure with (`shapes`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

HOLLOW = "hollow.json"  # in the folder of a model whose weight files are empty: random numbers shall take their place


def fill_hollow(model: str, loaded: Any) -> None:
    """Makes the weights of the model that was loaded from folder `model`, if that one is hollow."""
    if (spread := hollow(Path(model))) is not None:
        for name, parameter in loaded.named_parameters():
            fill(name, parameter, spread)


def hollow(folder: Path) -> float | None:
    """The standard deviation of the random weights that the model in `folder` shall get; None: it has its own."""
    path = folder / HOLLOW
    return float(json.loads(path.read_text(encoding="utf-8"))["standard_deviation"]) if path.exists() else None


def fill(name: str, parameter: torch.Tensor, spread: float) -> None:
    """Random numbers into a parameter of that name, in place: as large as a new model's, 1 for a norm, 0 for a bias.

    A shard of ZeRO is filled where it lies; one that waits on a disk stays zeros, and its text means nothing at all.
    """
    values = getattr(parameter, "ds_tensor", parameter).data
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if values.device.type == "meta" or values.numel() == 0:
        return
    if not values.is_floating_point():
        _fill_rounded(parameter, values, spread)
    elif len(shape) > 1:
        # What waits in host memory comes from the GPU: of one core, seven billion numbers take half a minute.
        if values.device.type == "cpu" and torch.cuda.is_available():
            values.copy_(torch.empty_like(values, device="cuda").normal_(0.0, spread))
        else:
            values.normal_(0.0, spread)
    else:
        values.fill_(0.0 if name.endswith("bias") else 1.0)


def _fill_rounded(parameter: Any, values: torch.Tensor, spread: float) -> None:
    """The same into a weight that bitsandbytes has rounded: any numbers, with scales that give them that spread."""
    if getattr(parameter, "SCB", None) is not None:  # 8 bits: the largest number of a row stands for its scale
        values.random_(-127, 128)
        parameter.SCB.fill_(spread * 3**0.5)
    elif getattr(parameter, "quant_state", None) is not None:  # 4 bits, two of them a byte: places in a table
        values.random_(0, 256)
        parameter.quant_state.absmax.fill_(spread / parameter.quant_state.code.std())
