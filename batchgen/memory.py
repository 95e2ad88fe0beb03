"""How many rows fit: an estimate before a batch, and what an out-of-memory error has taught."""

from __future__ import annotations

import gc
import math
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from batchgen.types import Generation, Prompt

_MOST_ROWS = 512
_MOST_ROWS_ON_CPU = 32  # beyond this a CPU gains nothing, and one batch would take minutes to commit
_SHARE = 0.8  # of free memory; the rest is for fragmentation and what the estimate leaves out
_BUCKET = 1.25  # lengths within this factor share a limit

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # errno 12 in other words
    "bad_alloc",  # C++, through a torch error
    "alloc_failed",  # cuBLAS's workspace
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def release() -> None:
    """Gives back what nobody needs: modules refer to each other, and their tensors would outlive an engine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def devices() -> list[str]:
    """The name of each GPU that this process holds memory of; none: it computes on the CPU."""
    held = [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
    return [torch.cuda.get_device_name(number) for number in held]


class SizeLimits:
    """The most rows a batch may have, by its length in tokens (prompt and new ones), learnt from running out."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # lower edge of a bucket of lengths → rows

    def remember(self, length: int, rows: int) -> None:
        """From `length` tokens up, a batch has no more than `rows` rows; 0: not even one fits."""
        edge = math.floor(_BUCKET ** math.floor(math.log(max(length, 1), _BUCKET)))
        self._rows[edge] = min(rows, self._rows.get(edge, rows))

    def most(self, length: int) -> int | None:
        """Most rows of a batch of `length` tokens; None: nothing learnt.

        A shorter batch may have more rows in proportion: the cache and the activations grow with rows x length.
        """
        known = ((edge, rows) for edge, rows in self._rows.items() if rows or length >= edge)
        return min((max(rows, rows * edge // max(length, 1)) for edge, rows in known), default=None)


def cache_bytes_per_token(config: Any, item_bytes: int, ranks: int = 1) -> int:
    """A key and a value a layer, of one token, on each of the `ranks` that share the model's heads."""
    heads, head_size = cached_heads(config)
    size: int = config.get_text_config().num_hidden_layers * 2 * math.ceil(heads / ranks) * head_size * item_bytes
    return size


def cached_heads(config: Any) -> tuple[int, int]:
    """Heads of keys, or of values, that a layer's cache holds, and the size of one; without attention, none."""
    text = config.get_text_config()
    heads = _most(text, "num_attention_heads")
    if not heads:
        return 0, 0
    size = _most(text, "head_dim") or text.hidden_size // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1, size  # as Falcon-7B and StarCoder have it
    cached = _most(text, "num_key_value_heads") or _most(text, "num_kv_heads")
    return cached or heads, size


def _most(text: Any, name: str) -> int | None:
    """A size that the config of a text model gives, of the layer that has most where it gives one a layer; None: it
    gives none."""
    try:
        given = getattr(text, name, None)
    except RuntimeError:  # so Transformers says that its layers differ
        given = [getattr(text.per_layer_config[layer], name) for layer in range(text.num_hidden_layers)]
    return max(given, default=None) if isinstance(given, (list, tuple)) else given


def bytes_per_row(
    config: Any, *, prompt_tokens: int, new_tokens: int, item_bytes: int, eager: bool, ranks: int = 1
) -> int:
    """Memory that one row of a batch takes on each of the `ranks` that share the model's heads: an estimate from the
    config alone.

    The cache holds a key and a value a layer and token; that of a state-space model (Mamba) a state a layer, of any
    number of tokens. Logits are float32, twice: as computed and as processed. During prefill one layer's activations
    live at a time: about four of the hidden size and three of the MLP's. `eager` attention writes its scores out, in
    the model's type and in float32.
    """
    text = config.get_text_config()
    heads = math.ceil((_most(text, "num_attention_heads") or 0) / ranks)
    cache = cache_bytes_per_token(config, item_bytes, ranks) * (prompt_tokens + new_tokens)
    logits = text.vocab_size * 4 * 2
    inner = math.ceil((_most(text, "intermediate_size") or 4 * text.hidden_size) / ranks)
    activations = prompt_tokens * (4 * text.hidden_size + 3 * inner) * item_bytes
    scores = heads * prompt_tokens**2 * (item_bytes + 4) if eager else 0
    kept = (getattr(text, "state_size", None) or 0) + (getattr(text, "conv_kernel", None) or 0)
    states = 0 if heads else text.num_hidden_layers * inner * kept * item_bytes
    return int(cache + logits + activations + scores + states)


def rows_that_fit(free: int, row: int, device: torch.device, most: int | None = None) -> int:
    """Rows of `row` bytes that fit into `free` with room to spare, in eights from 8 up: 1 to `most`.

    `most` is 512 unless given, and never more than 32 on a CPU.
    """
    most = _MOST_ROWS if most is None else most
    if device.type == "cpu":
        most = min(most, _MOST_ROWS_ON_CPU)
    rows = max(1, min(most, int(free * _SHARE) // max(row, 1)))
    return rows - rows % 8 if rows >= 8 else rows


def free_bytes(devices: Sequence[torch.device], local_size: int) -> int:
    """Memory that a batch can take: of all GPUs in `devices` what the fullest has, times their number, because each
    holds its share of the layers; without a GPU, this rank's share of the host's."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return host_free_bytes() // max(local_size, 1)
    return len(gpus) * min(_gpu_free_bytes(device) for device in gpus)


def _gpu_free_bytes(device: torch.device) -> int:
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def host_free_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory of this host that is available, or what the job's cgroup (version 2) leaves, whichever is less.

    Beyond a cgroup's limit there is no error to learn from: the kernel kills the process.
    """
    left = _meminfo(meminfo, "MemAvailable")
    for most, used in _cgroup_limits(membership, cgroups):
        left = min(left, most - used)
    return max(left, 0)


def host_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    membership: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory that this host has, or that the job's cgroup (version 2) may have, whichever is less; used or not."""
    return min([_meminfo(meminfo, "MemTotal"), *(most for most, _ in _cgroup_limits(membership, cgroups))])


def _meminfo(meminfo: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _cgroup_limits(membership: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Bytes that may be used and are, of each cgroup that this process is in."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        number, _, path = line.split(":", 2)
        own = cgroups / path.lstrip("/")
        for folder in (own, *own.parents) if number == "0" else ():
            limit, used = folder / "memory.max", folder / "memory.current"
            if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
                yield int(most), int(used.read_text()) - _page_cache(folder / "memory.stat")


def _page_cache(statistics: Path) -> int:
    """Bytes of files that were read and can be forgotten at once, which a cgroup counts as used."""
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def can_reserve(size: int, device: torch.device) -> bool:
    """Whether so many bytes of the device are there now; they are given back at once."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def refuse(prompt: Prompt) -> Generation:
    """What becomes of a prompt for which there is not enough memory, even with nothing beside it."""
    return Generation.failed(
        prompt,
        "out_of_memory",
        f"line {prompt.line}: {len(prompt.tokens)} prompt tokens and up to {prompt.params.max_new_tokens} new ones "
        "do not fit into memory, even alone in a batch. Lower max_new_tokens, shorten the prompt, "
        "or use a machine with more memory or a smaller --dtype",
    )


def take_peak_bytes(devices: Sequence[torch.device]) -> int:
    """Most memory in use since the last call: of the fullest GPU; without one, of the process over its life."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    peak = max(torch.cuda.max_memory_allocated(device) for device in gpus)
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def cores() -> int:
    """Processor cores that this process may use; Slurm and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0))
