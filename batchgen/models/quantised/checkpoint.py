"""A quantised checkpoint: its layers that are stored in one of the formats, and the tensors that are plain."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from batchgen.models import architectures
from batchgen.models.definition.errors import ModelError
from batchgen.models.folder import weight_files
from batchgen.models.quantised import find_format, make_plain
from batchgen.models.quantised.format import Format
from batchgen.models.quantised.stored import StoredTensor, StoredWeight, list_tensors

Take = Callable[[StoredWeight], torch.Tensor]
"""Returns what stands for a quantised weight, in the shape of its parameter."""

_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
# How the names of tensors end that belong to a cache of 8 bits, and to attention in 8 bits, by several programs:
# `--kv-dtype fp8` finds its own scales.
_OF_CACHE = {
    *("k_scale", "v_scale", "kv_scale", "q_scale", "output_scale", "prob_output_scale"),
    *("k_zero_point", "v_zero_point", "q_zero_point", "output_zero_point"),
}

_one_at_once = threading.Lock()


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in the files of a model, of which nothing has been read but their headers."""

    weights: Mapping[str, StoredWeight]
    """By the name of the parameter that each would be if it were not quantised."""
    plain: Mapping[str, StoredTensor]
    """Those of which nothing is to be computed, by name."""

    @classmethod
    def read(cls, folder: Path, written: Format) -> Checkpoint:
        """Returns that of the model in `folder`, whose config describes the format `written`.

        Raises:
            ModelError: a file is none of safetensors; a tensor is missing or has another type or shape than the config
                says, or the format has no place for it.
        """
        tensors = list_tensors(weight_files(folder))
        tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _OF_CACHE}
        weights = {weight.name: weight for weight in written.find_weights(tensors)}
        if not weights and written.has_weights:
            raise ModelError(
                f"the quantization_config in {folder / 'config.json'} says {written.name}, and no tensor in the files "
                "beside it is of that format; take the config.json that belongs to these weights"
            )
        used = {part.name for weight in weights.values() for part in weight.parts.values()}
        plain = {name: tensor for name, tensor in tensors.items() if name not in used}
        _check_plain(plain.values(), written)
        layers = {weight.name.removesuffix("weight") for weight in weights.values()}
        beside = {name for name in plain if name.endswith(written.ends) and f"{name.rpartition('.')[0]}." in layers}
        return cls(weights, {name: tensor for name, tensor in plain.items() if name not in beside})

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating type that most bytes of the plain tensors have; None: there are none."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.plain.values():
            if tensor.dtype in _FLOATING:
                dtype = _FLOATING[tensor.dtype]
                sizes[dtype] += _BYTES[dtype] * torch.Size(tensor.shape).numel()
        return sizes.most_common(1)[0][0] if sizes else None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of each parameter, by its name in the files."""
        shapes = {name: list(tensor.shape) for name, tensor in self.plain.items()}
        for name, weight in self.weights.items():
            *experts, rows, columns = weight.shape
            shapes[name] = [*experts, columns, rows] if weight.is_transposed else [*experts, rows, columns]
        return shapes

    def make_state_dict(self, take: Take) -> dict[str, Any]:
        """Returns what Transformers loads: each tensor by the name that the loader knows, made when it is asked for."""
        made = {name: _Lazy(tensor.view) for name, tensor in self.plain.items()}
        return made | {name: _Lazy(partial(take, weight)) for name, weight in self.weights.items()}


def find_checkpoint(folder: Path, config: Any) -> Checkpoint | None:
    """Returns the quantised checkpoint of the model in `folder`; None: it is not quantised, or Transformers reads it.

    Args:
        config: its Transformers config.

    Raises:
        ModelError: as `find_format` and `Checkpoint.read`.
    """
    found = find_format(config)
    return None if found is None else Checkpoint.read(folder, found)


def load(config: Any, state_dict: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Returns the model of a quantised checkpoint, and Transformers' report, as its `from_pretrained` does.

    Args:
        config: says how the checkpoint is quantised, of which Transformers shall not know.
        state_dict: by `Checkpoint.make_state_dict`.
        arguments: for `from_pretrained`.
    """
    model, report = architectures.model_class(config).from_pretrained(
        None,
        config=make_plain(config),
        state_dict=state_dict,
        trust_remote_code=False,
        output_loading_info=True,
        **arguments,
    )
    model.config.name_or_path = model.name_or_path = config.name_or_path
    return model, report


def load_widened(config: Any, checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> Any:
    """As `load`, with quantised weights that are widened as Transformers asks for them, one after the other.

    What Transformers widens of these formats by itself, it widens less exactly or not at all: of FP8 whose rows are no
    multiple of a block, versions 5.17 and 5.23 take a wrong scale.
    """
    dtype = arguments.get("dtype")
    if not isinstance(dtype, torch.dtype):  # it is rounded once more by bitsandbytes
        dtype = config.get_text_config().dtype or torch.float32
    take = partial(widen, dtype=dtype, device=_find_device(arguments.get("device_map")))
    return load(config, checkpoint.make_state_dict(take), {**arguments, "dtype": dtype})


def _find_device(places: Any) -> str:
    """Returns where quantised weights are widened: where the whole model goes, or on a GPU that there is."""
    if isinstance(places, dict) and set(places) == {""}:
        return str(places[""])
    return "cuda" if places is not None and torch.cuda.is_available() else "cpu"


def widen(weight: StoredWeight, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Returns the numbers that a quantised weight stands for, in the shape of its parameter; one at a time."""
    with _one_at_once:  # each takes several times its own size in float32
        wide = weight.read(device).widen(dtype)
    return wide.transpose(-1, -2) if weight.is_transposed else wide


def _check_plain(tensors: Iterable[StoredTensor], written: Format) -> None:
    """Raises ModelError if a tensor is of 8 bits, or packed, and the format has not found what it belongs to."""
    for tensor in tensors:
        packed = tensor.name.endswith((".qweight", ".weight_packed", "_blocks"))
        if tensor.dtype.startswith("F8") or packed or (tensor.dtype == "I8" and tensor.name.endswith("weight")):
            raise ModelError(
                f"{tensor.file.path} holds {tensor.name} as {tensor.dtype}, which is not in the format {written.name} "
                "as the quantization_config in config.json describes it; take the model in another precision"
            )


class _Lazy:
    """A tensor that is made when the loader of Transformers slices it, as it does with those in files."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make()[index]
