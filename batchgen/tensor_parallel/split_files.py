"""A rank's share of a model as files of its own: written by `batchgen split`, read in place of the original."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from batchgen.engine import EngineError
from batchgen.models import Report, ResolvedModel, loading, split_folder
from batchgen.models.definition.build import build_empty
from batchgen.models.definition.model_config import read_config
from batchgen.models.int8 import Int8Weight
from batchgen.models.quantised import find_format
from batchgen.models.tokenizer import HfTokenizer
from batchgen.tensor_parallel import process_group
from batchgen.tensor_parallel.autotp import check_split, split
from batchgen.tensor_parallel.rounded import Rounding
from batchgen.tensor_parallel.weights import copy_weights, map_model
from batchgen.tensor_parallel.written_folder import copy_definition, divide, making_folder, save


def write_split(source: ResolvedModel, out: Path, count: int, dtype: str, report: Report) -> Path:
    """Writes the model `source` into the new folder `out`, split over `count` ranks; returns its absolute path.

    Plays one rank after the other, so it needs memory for one rank's share.

    Args:
        dtype: as `--dtype` takes it, or int8: 8 bits with scales.

    Raises:
        EngineError: the model cannot be loaded or not be split like this, or `out` cannot be written.
    """
    folder = str(source.folder)
    if split_folder.read(source.folder) is not None:
        raise EngineError(f"{folder} is split already; split the model it was made from")
    if out.exists():
        raise EngineError(f"{out} exists; choose another folder, or remove it")
    config = HfTokenizer(folder).config
    if find_format(config) is not None:
        raise EngineError(
            f"the weights in {folder} are quantised (quantization_config in config.json), and are not split by rank; "
            "run the model as it is, with --tp, or split it in another precision"
        )
    if count > 1:
        check_split(config, count)
    own = dtype in ("auto", "int8")  # the machine that splits a model is not the one that runs it
    computes_in = loading.own_dtype(config) if own else loading.floating_dtype(dtype, config)
    named = loading.name_of(computes_in)
    out = out.absolute()
    with making_folder(out) as half:
        writer = _RankWriter(folder, half, count, computes_in, Int8Weight if dtype == "int8" else None)
        files = []
        for rank in range(count):
            files.append(writer.write(rank))
            report(writer.describe(rank, files[rank]))
        copy_definition(source.folder, half)
        version = importlib.metadata.version("deepspeed")
        kept = "int8" if dtype == "int8" else named
        whole = split_folder.Split(count, kept, named, source.name, source.revision, files, version)
        (half / split_folder.NAME).write_bytes(split_folder.to_json(whole))
    return out


@dataclass(frozen=True, slots=True)
class _RankWriter:
    """Writes the shares of a model into files, rank by rank."""

    folder: str  # of the whole model
    out: Path
    ranks: int
    dtype: torch.dtype
    rounding: Rounding | None

    def write(self, rank: int) -> list[str]:
        """Writes the share of one rank; returns the names of its files."""
        with process_group.fake_group(rank, self.ranks):
            model = map_model(self.folder, None)
            if self.ranks > 1:
                group = dist.group.WORLD
                assert group is not None
                split(model, group)
            copy_weights(model, self.folder, torch.device("cpu"), self.dtype, rounding=self.rounding)
        names: list[str] = []
        # A shared tensor is written once, by its first path. Buffers that no checkpoint has are among them: they are
        # computed where a whole model is made.
        for tensors in divide([*model.named_parameters(), *model.named_buffers()]):
            names.append(f"rank-{rank:05d}-{len(names) + 1:05d}.safetensors")
            save(tensors, self.out / names[-1])
        return names

    def describe(self, rank: int, names: Sequence[str]) -> str:
        """Returns a sentence about the files of one rank."""
        size = sum((self.out / name).stat().st_size for name in names)
        return f"rank {rank} of {self.ranks}: {size / 1e9:.2f} GB in {len(names)} file{'s' if len(names) > 1 else ''}"


def read_split(
    folder: Path,
    layout: split_folder.Split,
    group: dist.ProcessGroup,
    device: torch.device,
    attn_implementation: str | None,
) -> Any:
    """Reads this rank's share of the split model in `folder` onto `device`.

    Args:
        layout: what `folder` says of itself.
        group: the ranks that share the model, one for each share.

    Raises:
        EngineError: the files do not fit the model, as another DeepSpeed's may not.
    """
    rank = dist.get_rank(group)
    model = build_hollow(folder, getattr(torch, layout.computes_in), attn_implementation)
    if layout.ranks > 1:
        split(model, group)
    tensors: dict[str, torch.Tensor] = {}
    for name in layout.files[rank]:
        try:
            with safe_open(folder / name, framework="pt", device=str(device)) as file:
                tensors |= {path: file.get_tensor(path) for path in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"{folder / name} cannot be read ({error}); copy it again, or split the model again"
            ) from error
    try:
        _fill(model, tensors)
    except (KeyError, ValueError) as error:
        ours = importlib.metadata.version("deepspeed")
        raise EngineError(
            f"{folder} does not fit the model: {error}. It was split with DeepSpeed {layout.deepspeed}, and this is "
            f"{ours}; split the model again"
        ) from error
    return model


def build_hollow(folder: Path, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """Returns the model without weights: each parameter is a view of one number, of the right shape.

    They are not on the device "meta", for which AutoTP would allocate all the memory.
    """
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = build_empty(read_config(str(folder)), dtype, **attention)
    made: dict[int, nn.Parameter] = {}
    # Warning: the parameters of a model of Transformers are replaced by views of one number, here, and by tensors of
    # the files, or by `Int8Weight`, which is a module, in `_fill`. torch's `_parameters` is changed by hand, since
    # `setattr` refuses a module where a parameter was. A version of torch that keeps parameters elsewhere computes with
    # those views: zeros.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(hollow, requires_grad=False))
    return model.eval()


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts `tensors`, by their paths, in place of the parameters and buffers of `model`.

    Raises:
        KeyError, ValueError: one is missing, or of another shape.
    """
    made: dict[int, nn.Module | nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _make_weight(f"{path}.{name}".lstrip("."), parameter, tensors)
            del module._parameters[name]
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not isinstance(module, Int8Weight):
                module._buffers[name] = tensors[f"{path}.{name}".lstrip(".")]


def _make_weight(path: str, parameter: nn.Parameter, tensors: dict[str, torch.Tensor]) -> nn.Module | nn.Parameter:
    made: nn.Module | nn.Parameter
    if f"{path}.values" in tensors:
        made = Int8Weight(tensors[f"{path}.values"], tensors[f"{path}.scales"])
    else:
        made = nn.Parameter(tensors[path], requires_grad=False)
    if made.shape != parameter.shape:
        raise ValueError(f"{path} is {list(made.shape)}, not {list(parameter.shape)}")
    return made
