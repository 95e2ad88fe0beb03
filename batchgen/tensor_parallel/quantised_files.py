"""`batchgen quantise`: a model whose weights are rounded once, in files that others read too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from batchgen.engine import EngineError
from batchgen.models import ResolvedModel, random_weights, split_folder
from batchgen.models.definition.model_config import read_config
from batchgen.models.folder import Report
from batchgen.models.quantised import get_settings, has_quantised_weights
from batchgen.models.quantised.compressed_files import make_settings, make_tensors
from batchgen.models.quantised.places import is_transposed
from batchgen.models.quantised.rounding import Scheme, round_weight
from batchgen.tensor_parallel.file_views import find_pieces
from batchgen.tensor_parallel.mapped_files import MappedFiles
from batchgen.tensor_parallel.rounded import RoundingPlan
from batchgen.tensor_parallel.weights import map_model, plan_of
from batchgen.tensor_parallel.written_folder import copy_definition, divide, making_folder, save

_CONFIG = "config.json"
_NO_SUCH_FORM = "which the format compressed-tensors does not have"


def write_quantised(source: ResolvedModel, out: Path, dtype: str, group_size: int, report: Report) -> Path:
    """Writes the model `source`, its weights rounded, into the new folder `out`; returns its absolute path.

    Reads, rounds and writes parameter by parameter, on a GPU if there is one; host memory holds a file's worth and the
    largest parameter.

    Args:
        dtype: fp8, int8 or int4.
        group_size: as `Scheme` takes it.

    Raises:
        EngineError: the model cannot be loaded or not be rounded like this, or `out` cannot be written.
    """
    scheme = Scheme.of(dtype, group_size)
    assert scheme is not None
    _check(source, out)
    model = map_model(str(source.folder), None)
    plan = plan_of(model, scheme)
    writer = _Writer(model, plan, source.folder, report)
    writer.check_names()
    out = out.absolute()
    with making_folder(out) as half:  # what an end in between leaves has no config
        writer.write(half)
        copy_definition(source.folder, half, without=_CONFIG)
        config = json.loads((source.folder / _CONFIG).read_text(encoding="utf-8"))
        config["quantization_config"] = make_settings(plan.scheme, writer.kept)
        (half / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def _check(source: ResolvedModel, out: Path) -> None:
    if split_folder.read(source.folder) is not None:
        raise EngineError(f"{source.folder} is split by rank; give the model it was made from")
    config = read_config(str(source.folder))
    if has_quantised_weights(config):
        raise EngineError(
            f"the weights in {source.folder} are quantised already ({get_settings(config).get('quant_method')}, by "
            "quantization_config in config.json); give the model in 16 bits"
        )
    if out.exists():
        raise EngineError(f"{out} exists; choose another folder, or remove it")


@dataclass
class _Writer:
    """Writes the weights of a mapped model into files."""

    model: Any
    plan: RoundingPlan
    folder: Path  # of the model
    report: Report
    kept: set[str] = field(default_factory=set)  # layers that are not rounded, by their names in the files

    def check_names(self) -> None:
        """Raises EngineError if weights have a form in files of this family that compressed-tensors does not have, or
        several of them are one tensor there, which a writer of one after the other cannot make."""
        homes: dict[str, str] = {}
        for path, parameter in self.model.named_parameters():
            empty = torch.empty(parameter.shape, device="meta")
            for name in self._rename(path, empty, is_rounded=id(parameter) in self.plan.chosen):
                if name in homes:
                    raise self._refuse(f"{homes[name]} and {path} as one tensor, {name}")
                homes[name] = path

    def write(self, folder: Path) -> None:
        """Writes the files, and an index of them if they are several."""
        names: list[str] = []
        index: dict[str, str] = {}
        size = 0
        for part in divide(self._list_tensors()):
            names.append(f"part-{len(names)}")
            save(part, folder / names[-1], {"format": "pt"})
            index |= dict.fromkeys(part, names[-1])
            written = sum(tensor.nbytes for tensor in part.values())
            size += written
            self.report(f"{size / 1e9:.2f} GB written, the last of them {next(reversed(part))}")
        final = {
            name: f"model-{number:05d}-of-{len(names):05d}.safetensors" if len(names) > 1 else "model.safetensors"
            for number, name in enumerate(names, 1)
        }
        for name, renamed in final.items():
            (folder / name).rename(folder / renamed)
        if len(names) > 1:
            places = {tensor: final[name] for tensor, name in sorted(index.items())}
            content = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _list_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields all tensors of the files, rounded or not; a shared one once, by its first name."""
        maps, hollow = MappedFiles(self.folder), random_weights.hollow(self.folder)
        device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.device_count() else "cpu")
        seen: set[int] = set()
        for path, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if hollow is not None and isinstance(tensor, nn.Parameter):
                whole = torch.empty(tensor.shape, dtype=tensor.dtype)
                random_weights.fill(path, whole, hollow)
            else:
                whole = maps.read(find_pieces(tensor) or tensor.detach(), torch.device("cpu"))
            is_rounded = id(tensor) in self.plan.chosen
            for name, part in self._rename(path, whole, is_rounded=is_rounded).items():
                if is_rounded:
                    weight = round_weight(part.to(device), self.plan.scheme, part.dtype).to("cpu")
                    yield from make_tensors(name, weight).items()
                    continue
                if part.dim() == 2 and name.endswith(".weight"):
                    self._keep(path, name)
                yield name, part

    def _keep(self, path: str, name: str) -> None:
        embedding = self.model.get_input_embeddings()
        if self.model.get_submodule(path.rpartition(".")[0]) is not embedding:
            self.kept.add(name.removesuffix(".weight"))
        elif self.model.get_output_embeddings() is not None:  # tied, and a linear layer all the same
            self.kept.add(next(n for n, m in self.model.named_modules() if m is self.model.get_output_embeddings()))

    def _rename(self, path: str, tensor: torch.Tensor, *, is_rounded: bool) -> dict[str, torch.Tensor]:
        """Returns what the files have of a parameter, by the names that they have for it.

        Raises:
            EngineError: it is to be rounded, and is no matrix [out, in] of a layer there.
        """
        try:
            found: dict[str, torch.Tensor] = revert_weight_conversion(self.model, {path: tensor})
        except Exception as error:  # each family has conversions of its own, and not all can be undone one by one
            raise self._refuse(f"{path} in a form that cannot be worked out ({type(error).__name__})") from error
        if not found:
            raise self._refuse(f"{path} in a form that cannot be worked out")
        if is_rounded:
            odd = next((name for name, part in found.items() if not name.endswith(".weight") or part.dim() != 2), None)
            if odd is not None:
                raise self._refuse(f"all experts of a layer in one tensor, {odd}, {_NO_SUCH_FORM}")
            if tensor.dim() == 2 and is_transposed(self.model.get_submodule(path.rpartition(".")[0])):
                raise self._refuse(f"{path} as [inputs, outputs], {_NO_SUCH_FORM}")
        return found

    def _refuse(self, what: str) -> EngineError:
        return EngineError(
            f"models of type {self.model.config.model_type} keep {what}, so that no rounded file of it can be written; "
            f"`batchgen run --dtype {self.plan.scheme.kind}` rounds it each time it is loaded"
        )
