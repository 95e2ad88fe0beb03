"""Quantised checkpoints made by hand, and the numbers that they stand for, by the formulas of each format.

Nothing of the package takes part: numbers are drawn as they are stored, packed bit by bit, and worked out in float64.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Source = torch.Generator | Tensor
"""What numbers are drawn from, or a weight that is rounded."""
Layer = Callable[[int, int, Source], tuple[dict[str, Tensor], Tensor]]
"""Of rows and columns: what the files hold of such a layer, by the ends of names, and what it stands for, float32."""

_QUANTISED = ("proj.weight", "w1.weight", "w2.weight", "w3.weight")
_NIBBLES_OF_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Case:
    """A format with its settings."""

    settings: Mapping[str, Any]
    make_layer: Layer
    kind: str
    inputs: str = ""
    inputs_group: int = 0


def _draw_scales(shape: tuple[int, ...], spread: float, source: Source) -> Tensor:
    return (torch.rand(shape, generator=source) + 0.5) * spread


def _draw_fp8(rows: int, columns: int, source: Source) -> Tensor:
    return torch.randn(rows, columns, generator=source).clamp(-4, 4).to(torch.float8_e4m3fn)


def _pack(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Of numbers from 0 to 15, [rows, 8 * words]: words, that of `order[i]` in bits 4i to 4i+3."""
    eights = numbers.long().unflatten(-1, (-1, 8))
    words = sum(eights[..., column] << (4 * place) for place, column in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _join_blocks(largest: Tensor) -> Tensor:
    """Of blocks of 64 by 64: those of 128 by 128, the last of which may be smaller."""
    padded = torch.nn.functional.pad(largest, (0, largest.shape[1] % 2, 0, largest.shape[0] % 2))
    return padded.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).amax((1, 3))


def fp8_blocks(rows: int, columns: int, source: Source, name: str = "weight_scale_inv") -> Any:
    if isinstance(source, Tensor):
        scales = source.float().unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).abs().amax((1, 3)) / 448
        scales = _join_blocks(scales)
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        values = (source.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        values = _draw_fp8(rows, columns, source)
        scales = _draw_scales((-(-rows // 128), -(-columns // 128)), 0.1, source)
    wide = torch.empty(rows, columns, dtype=torch.float64)
    for place in itertools.product(*map(range, scales.shape)):
        block = tuple(slice(128 * number, 128 * number + 128) for number in place)
        wide[block] = values[block].double() * scales[place].double()
    return {"weight": values, name: scales}, wide.float()


def fp8_tensor(rows: int, columns: int, source: Source) -> Any:
    values, scale = _draw_fp8(rows, columns, source), _draw_scales((), 0.1, source)
    tensors = {"weight": values, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.25)}
    return tensors, (values.double() * scale.double()).float()


def fp8_channels(rows: int, columns: int, source: Source) -> Any:
    values = _draw_fp8(rows, columns, source)
    scales = _draw_scales((rows, 1), 0.1, source).bfloat16()
    return {"weight": values, "weight_scale": scales}, (values.double() * scales.double()).float()


def fp8_one_scale(rows: int, columns: int, source: Source) -> Any:
    values, scale = _draw_fp8(rows, columns, source), _draw_scales((1,), 0.1, source).bfloat16()
    tensors = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([0.25], dtype=torch.bfloat16)}
    return tensors, (values.double() * scale.double()).float()


def int8_channels(rows: int, columns: int, source: Source) -> Any:
    values = torch.randint(-127, 128, (rows, columns), generator=source, dtype=torch.int8)
    scales = _draw_scales((rows, 1), 0.1 / 64, source)
    return {"weight": values, "weight_scale": scales}, (values.double() * scales.double()).float()


def _int4(group: int, rows: int, columns: int, source: Source, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Numbers from 0 to 15 [rows, columns]; scales and zeros [rows, groups]; and the group of each column."""
    if isinstance(source, Tensor):
        return *_round_to_int4(source.float(), group, dtype), torch.arange(columns) // group
    values = torch.randint(0, 16, (rows, columns), generator=source)
    groups = -(-columns // group)
    zeros = torch.randint(4, 12, (rows, groups), generator=source)
    return values, _draw_scales((rows, groups), 0.03, source).to(dtype), zeros, torch.arange(columns) // group


def _round_to_int4(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and zeros: the smallest of a group becomes 0, the largest 15."""
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-6) / 15).to(dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (parts / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return values.flatten(1).long(), scales, zeros.long()


def _widen(values: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    wide = torch.empty(values.shape, dtype=torch.float64)
    for group in range(scales.shape[1]):
        own = group_of == group
        wide[:, own] = (values[:, own] - zeros[:, [group]]).double() * scales[:, [group]].double()
    return wide.float()


def packed(group: int, *, symmetric: bool) -> Layer:
    """Of compressed-tensors; group 0: one a row."""

    def make(rows: int, columns: int, source: Source) -> Any:
        values, scales, zeros, group_of = _int4(group or columns, rows, columns, source, torch.bfloat16)
        tensors = {
            "weight_packed": _pack(values),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        else:
            tensors["weight_zero_point"] = _pack(zeros.t()).t().contiguous()
        return tensors, _widen(values, scales, zeros, group_of)

    return make


def awq(group: int) -> Layer:
    def make(rows: int, columns: int, source: Source) -> Any:
        values, scales, zeros, group_of = _int4(group, rows, columns, source, torch.float16)
        tensors = {
            "qweight": _pack(values.t(), _NIBBLES_OF_AWQ),
            "qzeros": _pack(zeros.t(), _NIBBLES_OF_AWQ),
            "scales": scales.t().contiguous(),
        }
        return tensors, _widen(values, scales, zeros, group_of)

    return make


def gptq(group: int, *, less: int, symmetric: bool = False, by_act: bool = False, any_zero: bool = False) -> Layer:
    """`less`: what zeros are stored less; of those that are 0, the next in a word lends it. `any_zero`: some are."""

    def make(rows: int, columns: int, source: Source) -> Any:
        values, scales, zeros, group_of = _int4(group, rows, columns, source, torch.float16)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        if any_zero:
            zeros = torch.randint(0, 16, zeros.shape, generator=source)
        if by_act:
            group_of = group_of[torch.randperm(columns, generator=source)]
        tensors = {
            "qweight": _pack(values).t().contiguous(),
            "qzeros": _pack((zeros - less).t()),
            "scales": scales.t().contiguous(),
            "g_idx": group_of.int(),
        }
        return tensors, _widen(values, scales, zeros, group_of)

    return make


_OF_CACHE = (
    *("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point"),
    *("k_proj.k_scale", "v_proj.v_scale", "k_proj.output_scale", "v_proj.output_scale"),
)
_VALUES_OF_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def mxfp4(experts: int, columns: int, rows: int, source: Source) -> tuple[dict[str, Tensor], Tensor]:
    """Experts of gpt-oss, whose module holds [experts, columns, rows]."""
    codes = torch.randint(0, 16, (experts, rows, columns), generator=source)
    exponents = torch.randint(121, 125, (experts, rows, columns // 32), generator=source)
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    tensors = {"blocks": blocks.view(experts, rows, -1, 16).to(torch.uint8), "scales": exponents.to(torch.uint8)}
    numbers = torch.tensor([*_VALUES_OF_E2M1, *(-value for value in _VALUES_OF_E2M1)], dtype=torch.float64)[codes]
    wide = torch.empty(experts, rows, columns, dtype=torch.float64)
    for column in range(columns):
        wide[..., column] = numbers[..., column] * 2.0 ** (exponents[..., column // 32] - 127).double()
    return tensors, wide.float().transpose(1, 2).contiguous()


def compressed(
    layout: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, *, written: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors. `written`: a format that the group names itself."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs}
    group |= {} if written is None else {"format": written}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


_FP8 = {"num_bits": 8, "type": "float"}
_INT4 = {"num_bits": 4, "type": "int"}
_TOKENS = {"dynamic": True, "strategy": "token", "symmetric": True}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}

CASES: dict[str, Case] = {
    "fp8 blocks": Case(_BLOCKS, fp8_blocks, "fp8", "fp8", 128),
    "fp8 blocks, other name": Case(_BLOCKS, lambda *sizes: fp8_blocks(*sizes, name="scale"), "fp8", "fp8", 128),
    "fp8 tensor": Case(
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, fp8_tensor, "fp8", "fp8"
    ),
    "compressed fp8 channels": Case(
        compressed("float-quantized", _FP8 | {"strategy": "channel"}, _FP8 | _TOKENS), fp8_channels, "fp8", "fp8"
    ),
    "compressed fp8 tensor": Case(
        compressed("float-quantized", _FP8 | {"strategy": "tensor"}, _FP8 | {"dynamic": False, "strategy": "tensor"}),
        fp8_one_scale,
        "fp8",
        "fp8",
    ),
    "compressed fp8 blocks": Case(
        compressed(
            "float-quantized",
            _FP8 | {"strategy": "block", "block_structure": [128, 128]},
            _FP8 | {"dynamic": True, "strategy": "group", "group_size": 128},
        ),
        lambda *sizes: fp8_blocks(*sizes, name="weight_scale"),
        "fp8",
        "fp8",
        128,
    ),
    "compressed fp8 weights": Case(compressed("float-quantized", _FP8 | {"strategy": "channel"}), fp8_channels, "fp8"),
    "compressed int8": Case(
        compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int"} | _TOKENS,
        ),
        int8_channels,
        "int8",
        "int8",
    ),
    "compressed int4": Case(
        compressed("pack-quantized", _INT4 | {"strategy": "group", "group_size": 64, "actorder": "weight"}),
        packed(64, symmetric=True),
        "int4",
    ),
    "compressed int4, zeros": Case(
        compressed("pack-quantized", _INT4 | {"strategy": "group", "group_size": 128, "symmetric": False}),
        packed(128, symmetric=False),
        "int4",
    ),
    "compressed int4, rows": Case(
        compressed("pack-quantized", _INT4 | {"strategy": "channel"}), packed(0, symmetric=True), "int4"
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, awq(64), "int4"
    ),
    "gptq": Case(_GPTQ, gptq(64, less=1), "int4"),
    "gptq symmetric": Case(_GPTQ | {"sym": True}, gptq(64, less=1, symmetric=True), "int4"),
    "gptq, any zero": Case(_GPTQ, gptq(64, less=1, any_zero=True), "int4"),
    "gptq, one group": Case(_GPTQ | {"group_size": -1}, gptq(1 << 20, less=1), "int4"),
    "gptq_v2, last group short": Case(
        _GPTQ | {"group_size": 128, "checkpoint_format": "gptq_v2"}, gptq(128, less=0), "int4"
    ),
    "gptq by act": Case(_GPTQ | {"desc_act": True}, gptq(64, less=1, by_act=True), "int4"),
}

MXFP4 = Case({"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}, fp8_blocks, "mxfp4")
"""Of gpt-oss, whose other layers are left alone."""


def write(case: Case, base: Path, quantised: Path, plain: Path, *, rounds: bool = False) -> list[str]:
    """Writes the model `base` with quantised layers into the new folder `quantised`; as float32 into `plain`.

    Args:
        rounds: the layers of `base` are rounded; else their numbers are drawn.

    Returns:
        The names of the layers.
    """
    source = torch.Generator().manual_seed(3)
    stored, wide, layers = {}, {}, []
    for name, tensor in load_file(base / "model.safetensors").items():
        stored[name] = wide[name] = tensor
        if name.endswith(_QUANTISED) and case is not MXFP4:
            del stored[name]
            layers.append(name.removesuffix(".weight"))
            tensors, wide[name] = case.make_layer(*tensor.shape, tensor if rounds else source)
            stored |= {f"{layers[-1]}.{end}": value for end, value in tensors.items()}
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del stored[name]
            layers.append(name)
            tensors, wide[name] = mxfp4(*tensor.shape, source)
            stored |= {f"{name}_{end}": value for end, value in tensors.items()}
    write_folder(base, plain, wide, None)
    write_folder(base, quantised, stored, case.settings)
    return layers


def add_cache_scales(folder: Path) -> None:
    """Adds to a checkpoint what several programs write beside it for a cache of 8 bits; a model without settings of
    quantisation gets those of its cache."""
    tensors = load_file(folder / "model.safetensors")
    for layer in {name.partition(".self_attn.")[0] for name in tensors if ".self_attn." in name}:
        tensors |= {f"{layer}.self_attn.{end}": torch.full((1,), 0.02) for end in _OF_CACHE}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    empty = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    settings = config.get("quantization_config", empty)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = settings | {"kv_cache_scheme": scheme}
    (folder / "config.json").write_text(json.dumps(config))


def write_folder(base: Path, out: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any] | None) -> None:
    """Writes a model like `base` with other weights."""
    shutil.copytree(base, out)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = dict(settings)
    (out / "config.json").write_text(json.dumps(config))
