"""The folder of an adapter: what kind it is, and its tensors by the weights that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from batchgen.models.definition.adapter import CONFIG, TENSORS, find_adapter, find_tensors
from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.files import describe_stand_in, read_json
from batchgen.models.lora.change import Change

_PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora_A\.weight|lora_embedding_A)|(?P<up>lora_B\.weight|lora_embedding_B)|(?P<bias>lora_B\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|base_layer\.(?P<base>weight|bias)|(?P<value>weight|bias))"
)
_MERGE_ELSEWHERE = "merge it with peft (merge_and_unload) into a copy of the model, and give that as --model"
# Settings of peft's LoraConfig by which an adapter is more than products that are added.
_UNKNOWN = (
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Ways to begin a training that change the base model as well, so that the product does not belong to the original.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, whose tensors are mapped from its file."""

    folder: Path
    config: Mapping[str, Any]
    changes: Mapping[str, Change]  # by the weights' names in the model, not scaled yet

    def scale(self, change: Change, layer: str, experts: int = 0) -> Change:
        """Returns `change` with the factor that the config has for `layer`.

        Args:
            experts: whose weights the change is of, if they are one parameter.

        Raises:
            ModelError: the config has no such factor, or another rank than the tensors.
        """
        if change.up is None and change.bias is None:
            return change
        rank, scale = _read_rank_and_scale(self.folder, self.config, layer)
        matrices = [tensor for tensor in (change.down, change.up) if tensor is not None]
        is_matrix = all(tensor.dim() == 2 for tensor in matrices)
        # The rows of A, the columns of B.
        if not is_matrix or {tensor.shape[at] for at, tensor in enumerate(matrices)} - {rank * max(experts, 1)}:
            raise ModelError(
                f"{self.folder}: {CONFIG} says rank {rank} for {layer}, and {change.tensor} is "
                f"{list(matrices[0].shape)}; take the two files that belong together"
            )
        return replace(change, scale=scale, experts=experts)


def read_adapter(name: str) -> Adapter:
    """Reads the adapter in the folder `name`.

    Raises:
        ModelError: it is none, not LoRA, of a kind that cannot be merged, or not whole; the message says what to do.
    """
    folder = find_adapter(name)
    config = read_json(folder / CONFIG) or {}
    _check_kind(folder, config)
    _check_patterns(folder, config)
    parts: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    path = find_tensors(folder)
    for tensor, content in _read_tensors(path).items():
        if not content.is_floating_point() or not content.float().isfinite().all():
            raise ModelError(
                f"{path}: the tensor {tensor} holds {_name_numbers(content)}, and weights are finite numbers; train "
                "the adapter again, or copy it again"
            )
        match = _PARTS.fullmatch(tensor.removeprefix(_PREFIX)) if tensor.startswith(_PREFIX) else None
        if match is None or "lora_" in match["layer"]:
            raise ModelError(
                f"{folder}: the tensor {tensor} is of no kind that can be merged as LoRA; {_MERGE_ELSEWHERE}"
            )
        kind = next(kind for kind in ("down", "up", "bias", "magnitude", "base", "value") if match[kind])
        weight = "bias" if kind == "bias" else match["base"] or match["value"] or "weight"
        kind = "value" if kind == "base" else kind
        parts.setdefault(f"{match['layer']}.{weight}", {})[kind] = (tensor, content)
    if not parts:
        raise ModelError(f"{folder} holds an adapter without a tensor; train it, or copy it again")
    changes = {weight: _make_change(folder, weight, found) for weight, found in parts.items()}
    return Adapter(folder, config, changes)


def describe(adapter: Adapter) -> str:
    """Returns a phrase with the folder of an adapter, and the model that it is for."""
    base = adapter.config.get("base_model_name_or_path")
    return f"the adapter in {adapter.folder}{f' (of {base})' if isinstance(base, str) and base else ''}"


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{folder / CONFIG}: peft_type is {kind!r}, and --adapter merges LoRA alone ('LORA'); "
            "merge it with peft into a copy of the model if it can be merged, and give that as --model"
        )
    for name in _UNKNOWN:
        if config.get(name):
            raise ModelError(f"{folder / CONFIG} sets {name}, which --adapter does not merge; {_MERGE_ELSEWHERE}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASES):
        raise ModelError(
            f"{folder / CONFIG}: init_lora_weights is {begun!r}, which changes the base model as well; save the "
            "adapter with peft's path_initial_model_for_weight_conversion, which makes it one of the original model"
        )


def _check_patterns(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError if what the config says by the names of layers is nothing that `_find_pattern` can read."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{folder / CONFIG}: {name} must be an object of numbers by layers, and is {patterns!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(
                    f"{folder / CONFIG}: the layer {pattern!r} in {name} is no regular expression ({error}); "
                    "copy the adapter again"
                ) from error
    listed = config.get("target_parameters") or []
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise ModelError(f"{folder / CONFIG}: target_parameters must be a list of names, and is {listed!r}")


def _name_numbers(tensor: torch.Tensor) -> str:
    return "NaN or infinity" if tensor.is_floating_point() else f"numbers of type {str(tensor.dtype)[6:]}"


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            stand_in = describe_stand_in(file.read(1000))
        if stand_in is not None:
            raise ModelError(f"{path} {stand_in}")
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, or is damaged. Such a file can run code as it is read, so this one is "
            f"not; save the adapter as {TENSORS[0]}"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}); copy the adapter again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ModelError(f"{path} holds no tensors by their names; save the adapter as {TENSORS[0]}")
    return found


def _make_change(folder: Path, weight: str, parts: Mapping[str, tuple[str, torch.Tensor]]) -> Change:
    tensor = next(iter(parts.values()))[0]
    found = {kind: content for kind, (_, content) in parts.items()}
    if ("up" in found) != ("down" in found) or ("magnitude" in found and "up" not in found):
        raise ModelError(
            f"{folder} is not whole: of lora_A and lora_B of {weight}, it has {tensor} alone; copy the adapter again"
        )
    magnitude = found.get("magnitude")
    turned = "lora_embedding" in parts["down"][0] if "down" in found else False
    if turned and magnitude is not None:
        raise ModelError(f"{folder}: {tensor} is DoRA of an embedding, which --adapter does not merge")
    if magnitude is not None and magnitude.numel() != found["up"].shape[0]:
        raise ModelError(
            f"{folder}: of {weight}, DoRA has {magnitude.numel()} lengths for {found['up'].shape[0]} rows; copy the "
            "adapter again"
        )
    return Change(
        tensor=tensor,
        value=found.get("value"),
        down=found.get("down"),
        up=found.get("up"),
        magnitude=None if magnitude is None else magnitude.flatten(),
        bias=found.get("bias"),
        is_turned=turned,
    )


def _read_rank_and_scale(folder: Path, config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """The rank of the two matrices of `layer`, and the factor of their product: alpha / rank, or with rank-stabilised
    LoRA alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732)."""
    rank = _find_pattern(config.get("rank_pattern"), layer, config.get("r"))
    alpha = _find_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    is_alpha = isinstance(alpha, (int, float)) and abs(alpha) <= torch.finfo(torch.float32).max
    if not isinstance(rank, int) or rank < 1 or not is_alpha:
        raise ModelError(
            f"{folder / CONFIG}: r and lora_alpha must be finite numbers, r 1 or more; for {layer} they are {rank!r} "
            f"and {alpha!r}"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _find_pattern(patterns: Any, layer: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, from a dot on, as peft has it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return otherwise
