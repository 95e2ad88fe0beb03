"""Quantised layers as the libraries of their formats read them, beside what is read here: `python -m` this module.

compressed-tensors and loguru, which it asks for, are in a folder of their own, `.venv/compressed`, by
`scripts/install test`: put it into PYTHONPATH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from batchgen.models.quantised import FORMATS
from batchgen.models.quantised.compressed_tensors import CompressedTensors
from batchgen.models.quantised.stored import list_tensors
from tests.kernels import say_cases
from tests.models.quantised.checkpoints import CASES, mxfp4

_ROWS, _COLUMNS = 256, 384


def read_here(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dot: str = ".") -> Tensor:
    """The weight that a file with these tensors of a layer is to this project, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({f"layer{dot}{end}": tensor.contiguous() for end, tensor in tensors.items()}, path)
        [weight] = FORMATS[settings["quant_method"]](settings).find_weights(list_tensors([path]))
        return weight.read("cpu").widen()


def read_by_compressed_tensors(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    packed = settings["format"] == "pack-quantized"
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
    weight: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight.float()


def read_awq_by_compressed_tensors(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    converter = AutoAWQConverter.from_autoawq_config(dict(settings))
    values, scales, zeros = converter._convert_gemm_module(tensors["qweight"], tensors["scales"], tensors["qzeros"])
    size = settings["group_size"]
    spread = [of_groups.float().repeat_interleave(size, 1) for of_groups in (scales, zeros)]
    return (values.float() - spread[1]) * spread[0]


def compare(device: str) -> Iterator[tuple[str, bool]]:
    source = torch.Generator().manual_seed(5)
    for name, case in CASES.items():
        tensors, _ = case.make_layer(_ROWS, _COLUMNS, source)
        # In a type of 16 bits, theirs would be rounded to it.
        tensors = {end: one.float() if "weight_scale" in end else one.contiguous() for end, one in tensors.items()}
        if case.settings["quant_method"] == "compressed-tensors":
            theirs = read_by_compressed_tensors(case.settings, tensors)
        elif case.settings["quant_method"] == "awq":
            theirs = read_awq_by_compressed_tensors(case.settings, tensors)
        else:
            continue
        yield f"{name}: compressed-tensors", torch.equal(read_here(case.settings, tensors), theirs)


def compare_with_transformers(device: str) -> Iterator[tuple[str, bool]]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = torch.Generator().manual_seed(6)
    tensors, _ = mxfp4(4, _COLUMNS, _ROWS, source)
    theirs = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=torch.float32)
    here = read_here({"quant_method": "mxfp4"}, tensors, dot="_").transpose(1, 2)
    yield "mxfp4: Transformers", torch.equal(here, theirs)
    case = CASES["fp8 blocks"]
    tensors, _ = case.make_layer(_ROWS, _COLUMNS, source)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    yield "fp8 blocks: Transformers", torch.equal(read_here(case.settings, tensors), theirs)


TARGETS = {
    "a name is before an expression": (["re:.*mlp.*"], ["layers.0.mlp"]),
    "an expression is before a class": (["Linear"], ["re:.*mlp$"]),
    "expressions are in the order of their letters": (["re:.*mlp"], ["re:.*0.*"], ["Linear"]),
    "an expression begins where the name does": (["re:mlp"], ["Linear"]),
    "of equal targets the last is taken": (["Linear", "re:.*mlp"], ["re:.*mlp"]),
}


def compare_targets(device: str) -> Iterator[tuple[str, bool]]:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    for name, targets in TARGETS.items():
        groups = {}
        for number, named in enumerate(targets):
            weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32 << number}
            groups[f"group_{number}"] = {"targets": named, "weights": weights, "format": "pack-quantized"}
        settings = {"format": "pack-quantized", "config_groups": groups}
        layers = [torch.nn.ModuleDict({part: torch.nn.Linear(256, 256) for part in ("mlp", "attn")}) for _ in range(2)]
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
        apply_quantization_config(model, QuantizationConfig(**settings), show_progress=False)
        read = CompressedTensors.of(settings)
        same = []
        for path, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and hasattr(layer, "quantization_scheme"):
                same.append(read._find_scheme(path).group == layer.quantization_scheme.weights.group_size)
        yield f"{name}: compressed-tensors", len(same) >= 2 and all(same)


if __name__ == "__main__":
    say_cases(compare, compare_targets, compare_with_transformers)
