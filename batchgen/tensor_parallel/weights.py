"""A model whose weights still lie in their files, and the copy of a rank's share of it to where the rank computes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from batchgen.engine import EngineError
from batchgen.models import loading
from batchgen.models.definition.model_config import read_config
from batchgen.models.folder import weight_files
from batchgen.models.int8 import Int8Weight
from batchgen.models.lora import Change, merged_on_load
from batchgen.models.quantised.checkpoint import find_checkpoint
from batchgen.models.quantised.places import set_quantised
from batchgen.models.quantised.rounding import Scheme
from batchgen.models.quantised.weight import QuantisedWeight
from batchgen.tensor_parallel.file_views import Pieces, find_pieces, forget_pieces, keep_views
from batchgen.tensor_parallel.mapped_files import MappedFiles
from batchgen.tensor_parallel.quantised import find_placeholders, map_quantised, read_quantised, takes_quantised
from batchgen.tensor_parallel.rounded import Rounding, RoundingPlan, cut_experts, plan_rounding

Additions = Mapping[str, Callable[[torch.device], torch.Tensor]]
"""What is added to a parameter, by its path: a function that computes it on a device, in float32."""


_READERS = 4  # threads: a parallel file system, or a disk, serves several reads at once

# As the safetensors format names them.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def find_stored_dtype(folder: Path) -> torch.dtype:
    """Returns the floating type that most bytes of the weights in `folder` have.

    Raises:
        EngineError: the files cannot be read, or hold none.
    """
    sizes: Counter[torch.dtype] = Counter()
    for dtype, size in _list_stored(folder):
        sizes[dtype] += size
    if not sizes:
        raise EngineError(f"the weights in {folder} are of no floating type; this engine does not read packed ones")
    return sizes.most_common(1)[0][0]


def _list_stored(folder: Path) -> Iterator[tuple[torch.dtype, int]]:
    """Yields type and bytes of each floating tensor in the files of `folder`; only their headers are read."""
    files = weight_files(folder)  # all of one kind
    tables = [path for path in files if path.suffix == ".safetensors"]
    for path in tables:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            raise EngineError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in _TYPES:
                begin, end = tensor["data_offsets"]
                yield _TYPES[tensor["dtype"]], end - begin
    for path in () if tables else files:
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except UnpicklingError as error:
            raise loading.refused_pickle(folder) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(f"{path} cannot be read ({error}); copy or download it again") from error
        for tensor in tensors.values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                yield tensor.dtype, tensor.nbytes


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
        EngineError: the weights are quantised, and are to be cut as they cannot be, or to be rounded once more.
    """
    maps, hollow = MappedFiles(Path(folder)), loading.hollow(Path(folder))
    is_kept_exact = _find_kept_exact(model)
    homes, sources = _list_parameters(model)
    own = _find_own_dtype(sources.values())
    plan = plan_of(model, rounding) if isinstance(rounding, Scheme) else None
    placeholders = find_placeholders(model, folder, is_rounded=rounding is not None)

    def bring(key: int, part: torch.Tensor | Pieces) -> torch.Tensor:
        if hollow is None:
            return maps.read(part, device)
        here = torch.empty(part.shape, dtype=sources[key].dtype, device=device)
        loading.fill(homes[key][0][2], here, hollow)
        return here

    def copy(key: int) -> torch.Tensor | Int8Weight | QuantisedWeight:
        source, paths = sources[key], [path for *_, path in homes[key]]
        target = dtype if source.dtype == own and not any(map(is_kept_exact, paths)) else source.dtype
        if placeholders is not None:
            if (weight := read_quantised(placeholders, source, device, maps.forget)) is not None:
                keeps = all(takes_quantised(model, module, name) for module, name, _ in homes[key])
                return weight if keeps else weight.widen(target)
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

    size = 0
    # Warning: from here on the modules of Transformers and DeepSpeed hold other objects than they were made with: a
    # parameter may have become an `Int8Weight`, which is a module. `_parameters` is changed by hand, since `setattr`
    # refuses a module where a parameter was. If a new version of torch keeps parameters elsewhere, the old ones, which
    # are views of files, stay in use: the text is right, and memory is not what was planned.
    with ThreadPoolExecutor(_READERS) as readers, torch.no_grad():
        for key, made in zip(homes, readers.map(copy, list(homes)), strict=True):
            size += _put(made, homes[key], dtype)
            sources[key].data = torch.empty(0)
            forget_pieces(sources[key])
    _copy_buffers(model, device)
    return size


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


def _list_parameters(model: nn.Module) -> tuple[dict[int, list[tuple[nn.Module, str, str]]], dict[int, nn.Parameter]]:
    """Returns where each parameter is (module, name in it, path), and the parameter itself; a shared one once."""
    homes: dict[int, list[tuple[nn.Module, str, str]]] = {}
    sources: dict[int, nn.Parameter] = {}
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
