"""A model whose weights still lie in their files, and the copy of a rank's share of it to where the rank computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchgen.engine import EngineError
from batchgen.models import loading, random_weights
from batchgen.models.definition.model_config import read_config
from batchgen.models.int8 import Int8Weight
from batchgen.models.lora import Change, merged_on_load
from batchgen.models.quantised.checkpoint import find_checkpoint
from batchgen.models.quantised.placeholders import Placeholders
from batchgen.models.quantised.places import set_quantised
from batchgen.models.quantised.rounding import Scheme
from batchgen.models.quantised.weight import QuantisedWeight
from batchgen.tensor_parallel.file_views import Pieces, find_pieces, forget_pieces, keep_views
from batchgen.tensor_parallel.mapped_files import MappedFiles
from batchgen.tensor_parallel.quantised import (
    check_share,
    find_placeholders,
    map_quantised,
    read_quantised,
    stands_for_quantised,
    takes_quantised,
)
from batchgen.tensor_parallel.rounded import Rounding, RoundingPlan, cut_experts, plan_rounding
from batchgen.tensor_parallel.stored_dtype import find_stored_dtype

Additions = Mapping[str, Callable[[torch.device], torch.Tensor]]
"""What is added to a parameter, by its path: a function that computes it on a device, in float32."""


_Homes = dict[int, list[tuple[nn.Module, str, str]]]
"""Where each parameter is: module, name in it, path."""
_Sources = dict[int, nn.Parameter]

_READERS = 4  # threads: a parallel file system, or a disk, serves several reads at once


def map_model(folder: str, attn_implementation: str | None, adapter: str = "") -> Any:
    """Returns the whole model on the CPU; its weights are mapped files of which nothing has been read.

    Of the adapter in the folder `adapter`, what is no product of small matrices is merged here, into memory; the
    products are added by `copy_weights`.

    In any other type than the files' own, Transformers would copy all of it.

    Raises:
        EngineError: as `loading.load`.
    """
    checkpoint = find_checkpoint(Path(folder), read_config(folder))
    if checkpoint is not None:
        return map_quantised(folder, checkpoint, attn_implementation)
    arguments = {"dtype": find_stored_dtype(Path(folder)), "attn_implementation": attn_implementation}
    with keep_views(), merged_on_load(adapter, _is_merged_whole):
        model = loading.load(folder, arguments, filled=False)
    _check_unpacked(folder, model)
    return model


def _is_merged_whole(change: Change) -> bool:
    return not change.is_low_rank


def _check_unpacked(folder: str, model: nn.Module) -> None:
    """Raises EngineError if weights are packed and have stayed so: a rank would take them without their scales.

    Of some formats, FP8 and MXFP4 for two, Transformers widens the weights as it loads them on a CPU.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise EngineError(
                f"the weights in {folder} are packed (quantization_config in config.json; {name} is of "
                f"{loading.name_of(parameter.dtype)}), which ranks that share a model do not read. Use --engine "
                "accelerate, or paged without --tp, or the model in another precision"
            )


def copy_weights(
    model: nn.Module,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounding: Rounding | None = None,
    additions: Additions | None = None,
) -> int:
    """Copies the parameters of `model`, views of files in `folder`, to `device`, one by one; returns their bytes there.

    Each is read, put into type `dtype` or rounded before the next: besides what it keeps, a rank needs memory for a few
    parameters of its own share, or for a few experts.

    Args:
        dtype: of parameters that are of the files' own type; others were given theirs by Transformers on purpose.
        rounding: of the weights that `models.quantised.selection` chooses, which lie beside the parameters afterwards
            (`models.quantised.places`); `Int8Weight`: of linear layers and embeddings; None: none is rounded.
        additions: what an adapter adds to parameters of this rank's share; None: nothing.

    Raises:
        EngineError: quantised weights are to be cut as they cannot be, or to be rounded once more.
    """
    maps, hollow = MappedFiles(Path(folder)), random_weights.hollow(Path(folder))
    is_kept_exact = _find_kept_exact(model)
    homes, sources = _list_parameters(model)
    own = _find_own_dtype(sources.values())
    plan = plan_of(model, rounding) if isinstance(rounding, Scheme) else None
    quantised = find_placeholders(model, folder, is_rounded=rounding is not None)
    size = 0 if quantised is None else _copy_quantised(model, quantised, (homes, sources), (device, dtype), maps.forget)

    def bring(key: int, part: torch.Tensor | Pieces) -> torch.Tensor:
        if hollow is None:
            return maps.read(part, device)
        here = torch.empty(part.shape, dtype=sources[key].dtype, device=device)
        random_weights.fill(homes[key][0][2], here, hollow)
        return here

    def copy(key: int) -> torch.Tensor | Int8Weight | QuantisedWeight:
        source, paths = sources[key], [path for *_, path in homes[key]]
        target = dtype if source.dtype == own and not any(map(is_kept_exact, paths)) else source.dtype
        added = [additions[path] for path in paths if additions is not None and path in additions]
        if plan is not None and key in plan.chosen and not added:
            return plan.round(key, (bring(key, part) for part in cut_experts(source)))
        here = bring(key, find_pieces(source) or source.data)
        for compute in added:
            here = here.float() + compute(device)
        if plan is not None and key in plan.chosen:
            return plan.round(key, iter([here.to(source.dtype)]))  # as merged weights are saved
        if rounding is Int8Weight and all(name == "weight" and _takes_8_bits(module) for module, name, _ in homes[key]):
            return Int8Weight.rounded(here, target)
        return here.to(target)

    # Warning: from here on the modules of Transformers and DeepSpeed hold other objects than they were made with: a
    # parameter may have become an `Int8Weight`, which is a module. `_parameters` is changed by hand, since `setattr`
    # refuses a module where a parameter was. If a new version of torch keeps parameters elsewhere, the old ones, which
    # are views of files, stay in use: the text is right, and memory is not what was planned.
    size += _replace(copy, homes, sources, dtype)
    _copy_buffers(model, device)
    return size


def _replace(
    make: Callable[[int], torch.Tensor | Int8Weight | QuantisedWeight],
    homes: _Homes,
    sources: _Sources,
    dtype: torch.dtype,
) -> int:
    """Puts what `make` gives for each parameter of `homes` in its place; returns the bytes of all."""
    size = 0
    with ThreadPoolExecutor(_READERS) as readers, torch.no_grad():
        for key, made in zip(homes, readers.map(make, list(homes)), strict=True):
            size += _put(made, homes[key], dtype)
            sources[key].data = torch.empty(0)
            forget_pieces(sources[key])
    return size


def _copy_quantised(
    model: Any,
    placeholders: Placeholders,
    listed: tuple[_Homes, _Sources],
    target: tuple[torch.device, torch.dtype],
    forget: Callable[[torch.Tensor], None],
) -> int:
    """Copies the quantised weights of a checkpoint, and takes them off the list; returns their bytes on the device.

    Args:
        listed: as `_list_parameters` returns it.
        target: where they are computed with, and in which type.
        forget: lets go of the pages of a view of a file.
    """
    check_share(model, placeholders)
    (homes, sources), (device, dtype) = listed, target
    read = {key: homes.pop(key) for key in list(homes) if stands_for_quantised(placeholders, sources[key])}

    def copy(key: int) -> torch.Tensor | QuantisedWeight:
        weight = read_quantised(placeholders, sources[key], device, forget)
        keeps = all(takes_quantised(model, module, name) for module, name, _ in read[key])
        return weight if keeps else weight.widen(dtype)

    return _replace(copy, read, sources, dtype)


def _find_own_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """Returns the type that most numbers of a mapped model have."""
    stored: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        stored[parameter.dtype] += parameter.numel()
    return stored.most_common(1)[0][0]


def _copy_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def plan_of(model: Any, scheme: Scheme) -> RoundingPlan:
    """Returns which parameters of a model, or of a rank's share of one, are rounded.

    Raises:
        EngineError: none would be, or the groups of the scheme do not divide a matrix.
    """
    return plan_rounding(model, scheme, _list_parameters(model)[0], _find_kept_exact(model))


def _list_parameters(model: nn.Module) -> tuple[_Homes, _Sources]:
    """Returns where each parameter is (module, name in it, path), and the parameter itself; a shared one once."""
    homes: _Homes = {}
    sources: _Sources = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sources[id(parameter)] = parameter
                homes.setdefault(id(parameter), []).append((module, name, f"{path}.{name}".lstrip(".")))
    return homes, sources


def _put(
    made: torch.Tensor | Int8Weight | QuantisedWeight, homes: list[tuple[nn.Module, str, str]], dtype: torch.dtype
) -> int:
    """Puts a parameter into the modules that share it; returns its bytes.

    Args:
        dtype: that quantised weights are computed with in.
    """
    if isinstance(made, QuantisedWeight):
        for module, name, _ in homes:
            set_quantised(module, name, made, dtype)
        return made.nbytes
    shared: nn.Module | nn.Parameter
    if isinstance(made, Int8Weight):
        shared, size = made, made.values.nbytes + made.scales.nbytes
    else:
        shared, size = nn.Parameter(made, requires_grad=False), made.nbytes
    for module, name, _ in homes:
        del module._parameters[name]
        setattr(module, name, shared)
    return size


def _takes_8_bits(module: nn.Module) -> bool:
    """Returns whether `module` is a linear layer or an embedding. Routers of experts are neither: they stay exact."""
    from deepspeed.module_inject.layers import TensorParallel_Layer

    weight = module._parameters["weight"]
    matrix = weight is not None and weight.dim() == 2 and weight.numel() > 0
    return matrix and isinstance(module, (nn.Linear, nn.Embedding, TensorParallel_Layer))


def _find_kept_exact(model: Any) -> Callable[[str], bool]:
    """Returns whether a parameter's path is one that Transformers keeps in float32, whatever type the model has."""
    names = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    names += getattr(model, "_keep_in_fp32_modules", None) or ()
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, names))})(\.|$)") if names else None
    return lambda path: pattern is not None and pattern.search(path) is not None
