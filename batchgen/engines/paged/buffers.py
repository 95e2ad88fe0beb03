"""Tensors in the memory of the host."""

from __future__ import annotations

import math

import numpy as np
import torch


def pinned(shape: tuple[int, ...], dtype: torch.dtype, gpu: bool) -> torch.Tensor:
    """Zeros that a GPU can be sent without waiting, if there is one."""
    return torch.zeros(shape, dtype=dtype, pin_memory=gpu)


def untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory of the host where they are written: `torch.zeros` writes them all, 12 GB in 14 seconds."""
    whole = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)  # the kernel's pages, zero until then
    return torch.from_numpy(whole).view(dtype).view(shape).to(device)
