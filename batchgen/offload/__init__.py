"""Weights that wait in host memory or on NVMe for their layer's turn, under ZeRO stage 3: sizes, checks, files, bounds.

All of it is known before a weight is loaded: `parameters` takes them from the config, `nvme` and `cpu` make DeepSpeed's
settings and refuse what cannot fit, `SwapFolder` keeps a run's files to itself. `read_bandwidth` and `share_of_bound`
say what the path can do and how much of it a step has used.

With offload every forward brings all weights in, so its time is at least their bytes divided by the bandwidth, however
large the batch: only a larger batch and fewer bytes a weight (`quantization`) raise the throughput.
"""

from __future__ import annotations

from batchgen.offload.bandwidth import copy_bandwidth, read_bandwidth, share_of_bound
from batchgen.offload.parameters import Parameters, parameters
from batchgen.offload.quantization import check_quantization, quantization, quantized
from batchgen.offload.room import check_folder, check_host_memory, check_locked_memory, check_space, lockable_bytes
from batchgen.offload.settings import Offload, cpu, nvme
from batchgen.offload.swap import SwapFolder

__all__ = [
    "Offload",
    "Parameters",
    "SwapFolder",
    "check_folder",
    "check_host_memory",
    "check_locked_memory",
    "check_quantization",
    "check_space",
    "copy_bandwidth",
    "cpu",
    "lockable_bytes",
    "nvme",
    "parameters",
    "quantization",
    "quantized",
    "read_bandwidth",
    "share_of_bound",
]
