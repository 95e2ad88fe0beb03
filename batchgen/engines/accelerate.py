"""Engine `accelerate`: a Transformers model through `model.generate`, in static batches.

Alone, the model is spread over all GPUs, then over the host's memory and a disk if it does not fit (Accelerate's
`device_map`). Under several ranks each rank holds a whole model on its own GPU and is a stream of its own.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from batchgen.device import release
from batchgen.engine import Engine, EngineError, Pace, Placement, Setup, Tokenizer
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.sizing import BatchSizing
from batchgen.generation.static_batches import StaticBatches
from batchgen.models import loading
from batchgen.models.tokenizer import HfTokenizer, tokenizer_of
from batchgen.types import Batch, Prompt
from batchgen.world import World

_MEMORY = re.compile(r"(cpu|\d+)=(\d+(?:\.\d+)?[KMG]i?B)")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # the maps that Accelerate works out itself


class Accelerate(Engine):
    """Runs a whole model on each rank, or one model over all devices that there are."""

    serves_cpu = True
    dtypes = (*Engine.dtypes, "int8", "nf4")
    pace = Pace(layer_seconds=0.00062)

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `accelerate`."""

        device_map: str = "auto"  # auto, balanced, balanced_low_0, sequential; or one device: cpu, cuda, cuda:1
        max_memory: str | None = None  # most weights a device, "0=20GiB,cpu=64GiB"; what is not named gets none
        offload_folder: str | None = None  # for weights that fit nowhere else; None: a temporary folder
        attn_implementation: str | None = None  # None: Transformers' choice

    @classmethod
    def packages(cls, options: Options, dtype: str) -> Sequence[str]:
        return ("accelerate", "bitsandbytes") if dtype in ("int8", "nf4") else ("accelerate",)

    @classmethod
    def check(cls, setup: Setup, tokenizer: Any, options: Options) -> None:
        super().check(setup, tokenizer, options)
        if options.device_map not in _SPREADING:
            _check_named_device(options)
        elif setup.world.size > 1:
            _check_alone(options)
        else:
            _check_max_memory(options.max_memory)

    def __init__(self, setup: Setup, options: Options) -> None:
        self._batches: StaticBatches | None = None
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        tokenizer = tokenizer_of(setup)
        loading.check_weights(setup.model)
        loading.prepare_transformers()
        placement = _choose_placement(options, setup.world)
        if placement["device_map"] in _SPREADING:
            placement["offload_folder"] = options.offload_folder or self._make_spill()
        try:
            model = _load(setup, options, placement, tokenizer.config)
        except BaseException:
            self.close()
            raise
        devices = _list_devices(model)
        loaded = LoadedModel(model, tokenizer, devices[0])
        sizing = BatchSizing(setup.batch_size, devices, setup.world.local_size)
        self._batches = StaticBatches(loaded, sizing, self.signs, check=setup.selftest)

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        size = weights.read_bytes
        whole = Placement((), gpus, gpus, device=size)
        spread = Placement((), 1, 1, device=-(-size // gpus), sharing=gpus, in_turn=True)
        return [whole, spread] if gpus > 1 else [whole]

    @classmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        return HfTokenizer(model)

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        if self._batches is None:
            raise EngineError("this engine is closed")
        yield from self._batches.run(prompts, stop)

    def close(self) -> None:
        self._batches = None
        release()
        if self._spill is not None:
            self._spill.cleanup()

    def _make_spill(self) -> str:
        self._spill = tempfile.TemporaryDirectory(prefix="batchgen-offload-", ignore_cleanup_errors=True)
        return self._spill.name


def _choose_placement(options: Accelerate.Options, world: World) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that say where the weights go."""
    if options.device_map not in _SPREADING:
        return {"device_map": {"": _find_named_device(options)}}
    if world.size > 1:
        return {"device_map": {"": _find_own_device(options, world)}}
    limits = _parse_max_memory(options.max_memory)
    if limits is None and not torch.cuda.is_available():
        return {"device_map": {"": "cpu"}}
    return {"device_map": options.device_map, "max_memory": limits}


def _check_named_device(options: Accelerate.Options) -> None:
    name = options.device_map
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise EngineError(f"device_map={name}: must be {', '.join(_SPREADING)}, cpu, cuda or cuda:N")
    if options.max_memory is not None:
        raise EngineError(
            f"max_memory spreads a model over devices, but device_map={name} names one; leave one of them out"
        )


def _find_named_device(options: Accelerate.Options) -> str:
    _check_named_device(options)
    name = options.device_map
    if name.startswith("cuda"):
        loading.check_gpu(int(name.partition(":")[2] or 0), f"device_map={name}")
    return name


def _check_alone(options: Accelerate.Options) -> None:
    if options.max_memory is not None or options.offload_folder is not None:
        raise EngineError(
            "max_memory and offload_folder spread one model over several devices; under several ranks each rank holds "
            "a whole model on its own device. Leave them out, or start one rank"
        )


def _find_own_device(options: Accelerate.Options, world: World) -> str:
    """Returns the device of this rank, which is one of several on this host."""
    _check_alone(options)
    return str(loading.device_of(world))


def _check_max_memory(text: str | None) -> list[tuple[str, str]]:
    """Checks `max_memory`; returns the device and the size of each of its parts."""
    parts = [_MEMORY.fullmatch(part.strip()) for part in text.split(",")] if text is not None else []
    if not all(parts):
        raise EngineError(f"max_memory={text}: must look like 0=20GiB,cpu=64GiB (a GPU's number or cpu, and a size)")
    return [(part[1], part[2]) for part in parts if part is not None]


def _parse_max_memory(text: str | None) -> dict[int | str, str] | None:
    if text is None:
        return None
    limits: dict[int | str, str] = {}
    for device, size in _check_max_memory(text):
        if device != "cpu":
            loading.check_gpu(int(device), f"max_memory={text}")
        limits["cpu" if device == "cpu" else int(device)] = size
    return limits


def _choose_precision(dtype: str, config: Any) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` for `--dtype`."""
    if dtype in ("auto", *loading.FLOATING):
        return {"dtype": loading.floating_dtype(dtype, config)}
    if dtype not in ("int8", "nf4"):
        raise EngineError(f"dtype {dtype!r} is not known; choose auto, float32, bfloat16, float16, int8 or nf4")
    computed_in = torch.float16 if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else torch.bfloat16
    quantization: dict[str, Any] = {"load_in_8bit": True}
    if dtype == "nf4":
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed_in}
    config = BitsAndBytesConfig(**quantization)  # type: ignore[no-untyped-call]
    return {"dtype": "auto", "quantization_config": config}


def _load(setup: Setup, options: Accelerate.Options, placement: dict[str, Any], config: Any) -> Any:
    attention = {"attn_implementation": options.attn_implementation}
    arguments = placement | _choose_precision(setup.dtype, config) | attention
    return loading.load(setup.model, arguments, adapter=setup.adapter)


def _list_devices(model: Any) -> list[torch.device]:
    """Returns the devices that compute: the model's GPUs, the one with the first layers first; or the CPU."""
    placed = [
        torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in _list_places(model)
    ]
    gpus = list(dict.fromkeys(device for device in placed if device.type == "cuda"))
    return gpus or [torch.device("cpu")]


def _list_places(model: Any) -> list[int | str]:
    # Layers that lie on the CPU or a disk are computed on a GPU if there is one.
    return [place for place in getattr(model, "hf_device_map", {"": str(model.device)}).values() if place != "disk"]
