"""Products of weights of 4 bits by package humming-kernels, where it is installed.

It compiles CUDA kernels for the sizes of a layer when they are first needed, a few seconds each, and keeps them on the
disk (HUMMING_CACHE_DIR). They are compiled for some numbers of tokens, all at once, from the moment a weight is packed,
so that they are mostly there when the first product asks for them.

On an H200 its products take as long as those in 16 bits from some 256 tokens on, and less below. Our own kernels
(`four_bits_kernel`) take 1.1 times as long as these with one token, and 1.6 times with 256 (benchmarks/README.md).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch

from batchgen.engines.paged.experts.grouped_gemm import Sorting, add_bias, take_rows
from batchgen.engines.paged.quantised.packed import HUMMING, Packed
from batchgen.models.quantised.weight import ZERO_OF_INT4, QuantisedWeight

logger = logging.getLogger(__name__)

# The most tokens that a kernel is chosen for, by the package's own rules; from the last one on it is the last kernel.
_TOKENS = (8, 16, 32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 384, 512, 1024, 2048, 8192)
_PAIRS = (8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 65536)  # the same, of experts

_ROWS, _COLUMNS = 128, 128  # their numbers are filled up to multiples of these, which every kernel takes
_LEAST_GROUP = 16  # of bfloat16 and float16 inputs; a group is divided into powers of two
_CAPABILITY = (9, 0)  # of GPUs that have been tried
_LOCKS = 2048  # of a GPU, by which programs of a product wait for each other; they leave zeros

_kernels: dict[tuple[str, torch.device], Future[torch.Tensor]] = {}
_locks: dict[torch.device, torch.Tensor] = {}


@cache
def is_installed() -> bool:
    """Whether the package is there."""
    try:
        return bool(version("humming-kernels"))
    except PackageNotFoundError:
        return False


@cache
def _works(device: torch.device) -> bool:
    """Whether the package compiles here, tried with a small product; its kernel stays on the disk."""
    values = torch.zeros((_ROWS, _COLUMNS // 2), dtype=torch.uint8, device=device)
    weight = QuantisedWeight("int4", values, torch.ones((_ROWS, 1), device=device))
    try:
        packed = _transform(weight, torch.bfloat16, None)
        inputs = torch.ones((_TOKENS[0], _COLUMNS), dtype=torch.bfloat16, device=device)
        output = _launch(inputs, packed, None, None, _compile(packed.form, device, _TOKENS[:1]))
        if not bool((output == -ZERO_OF_INT4 * _COLUMNS).all()):
            raise RuntimeError("a product is wrong")
    except Exception as error:  # compilers, libraries and headers of the machine
        first = str(error).strip().splitlines()
        logger.warning(
            "package humming-kernels is installed and does not work here (%s: %s): kernels of batchgen's own multiply "
            "weights of 4 bits, more slowly. The package needs a CUDA compiler; pip install 'humming-kernels[cu13]' "
            "brings one (cu12, where torch is built for CUDA 12)",
            type(error).__name__,
            first[0] if first else "",
        )
        return False
    return True


def covers(weight: QuantisedWeight, dtype: torch.dtype) -> bool:
    """Whether the package is installed, and takes a weight where it is, with inputs of `dtype`."""
    device = weight.values.device
    if device.type != "cuda" or not is_installed() or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    if not _works(device):
        return False
    rows, columns = weight.shape[-2:]
    group = weight.group
    has_whole_groups = weight.scales.shape[-1] == 1 or (columns % group == 0 and group & -group >= _LEAST_GROUP)
    is_known = weight.kind == "int4" or (weight.kind == "mxfp4" and group == 32)
    return is_known and dtype.itemsize == 2 and has_whole_groups and rows % 8 == 0 and columns % 8 == 0


def pack(weight: QuantisedWeight, dtype: torch.dtype, bias: torch.Tensor | None = None) -> Packed:
    """Returns the tensors of a weight that is covered, and begins to compile its kernels.

    Its `order` is not considered: the inputs have to be in it.

    Args:
        bias: that every product adds, [rows] or [experts, rows]; None: products are given one, or have none.
    """
    packed = _transform(weight, dtype, bias)
    _find_kernels(packed.form, weight.values.device)
    return packed


def _transform(weight: QuantisedWeight, dtype: torch.dtype, bias: torch.Tensor | None) -> Packed:
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    *experts, rows, columns = weight.shape
    has_zeros = weight.zeros is not None
    schema = HummingWeightSchema(
        b_dtype="float4e2m1" if weight.kind == "mxfp4" else "uint4",
        bs_dtype="float8e8m0" if weight.kind == "mxfp4" else None,
        weight_scale_group_size=weight.group if weight.scales.shape[-1] > 1 else 0,
        has_zero_point=has_zeros,
    )
    # The package's order in a word is ours: the first column in the lowest bits.
    tensors = {"weight": weight.values.contiguous().view(torch.int32), "weight_scale": weight.scales.contiguous()}
    if weight.kind == "int4":
        tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    if weight.zeros is not None:
        tensors["zero_point"] = _pack_zeros(weight.zeros)
    elif weight.kind == "int4":  # to a form that costs less to widen, if no number is the least one
        schema, tensors = schema.convert_symmetric_integer_weight(tensors)
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    config, tensors = prepare_and_transform_humming_tensors(
        tensors,
        rows,
        columns,
        schema,
        num_experts=experts[0] if experts else None,
        pad_n_to_multiple=_ROWS,
        pad_k_to_multiple=_COLUMNS,
        has_bias=bias is not None,
        torch_dtype=dtype,
        device=weight.values.device,
    )
    assert "weight_scale_2" not in tensors  # of 16-bit inputs it has one alone
    form = HUMMING + config.to_str()
    return Packed(form, tensors["weight"], tensors["weight_scale"], tensors.get("zero_point"), tensors.get("bias"))


def _pack_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """[…, rows, groups], uint8, to […, rows / 8, groups], int32: eight rows in a word, the first in the lowest bits."""
    *ahead, rows, groups = zeros.shape
    eight = zeros.view(*ahead, rows // 8, 8, groups).int()
    words = eight[..., 0, :].clone()
    for place in range(1, 8):
        words |= eight[..., place, :] << (4 * place)
    return words


@cache
def count_rows(form: str) -> int:
    """The rows of a weight that has this form."""
    config = _read_config(form)
    return int(config["shape_n"]) - int(config.get("pad_shape_n") or 0)


@cache
def _read_config(form: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(form.removeprefix(HUMMING))
    return config


def multiply(
    inputs: torch.Tensor, weight: Packed, bias: torch.Tensor | None, sorting: Sorting | None = None
) -> torch.Tensor:
    """Multiplies inputs [tokens, columns] by a weight; with `sorting`, the row of each pair by its expert's.

    Args:
        bias: [rows], or [experts, rows]; that of a weight which was packed with one is in the weight's own order.

    Returns:
        [tokens, rows], or [pairs, rows], sorted; rows of pairs without an expert are not written.
    """
    if sorting is not None:
        inputs = take_rows(inputs, sorting)
    if len(inputs) == 0:
        return inputs.new_empty((0, count_rows(weight.form)))
    has_bias = bool(_read_config(weight.form).get("has_bias"))
    kernels = _find_kernels(weight.form, inputs.device).result()
    output = _launch(inputs, weight, bias if has_bias else None, sorting, kernels)
    if bias is None or has_bias:
        return output
    return output.add_(bias) if sorting is None else add_bias(output, bias, sorting)


def _launch(
    inputs: torch.Tensor, weight: Packed, bias: torch.Tensor | None, sorting: Sorting | None, kernels: torch.Tensor
) -> torch.Tensor:
    from humming import ops

    output = torch.empty((len(inputs), count_rows(weight.form)), dtype=inputs.dtype, device=inputs.device)
    ops.launch_kernel(
        configs=kernels,
        inputs=inputs.contiguous(),
        weight=weight.values,
        weight_scale=weight.scales,
        zero_point=weight.zeros,
        bias=bias,
        outputs=output,
        expert_layout=None if sorting is None else sorting.offsets,
        locks=_get_locks(inputs.device),
    )
    return output


def _get_locks(device: torch.device) -> torch.Tensor:
    if device not in _locks:
        _locks[device] = torch.zeros(_LOCKS, dtype=torch.int32, device=device)
    return _locks[device]


def _find_kernels(form: str, device: torch.device) -> Future[torch.Tensor]:
    """The kernels of a form for all numbers of tokens, which are compiled once."""
    key = form, device
    if key not in _kernels:
        _get_locks(device)  # ahead of the first capture of a graph
        limits = _PAIRS if _read_config(form).get("num_experts") else _TOKENS
        _kernels[key] = _start_compilers().submit(_compile, form, device, limits)
    return _kernels[key]


@cache
def _start_compilers() -> ThreadPoolExecutor:
    """Threads that wait for compilers: the package starts processes, as many as there are cores."""
    return ThreadPoolExecutor(8, thread_name_prefix="humming")


def _compile(form: str, device: torch.device, limits: Sequence[int]) -> torch.Tensor:
    """Compiles the kernels of a form, each for at most so many tokens or pairs."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    config = _read_config(form)
    kind = "grouped_contiguous" if config.get("num_experts") else "dense"
    chosen: list[list[Any]] = []
    for begin, end in pairwise((0, *limits)):
        tuning = get_heuristics_config(config, end, gemm_type=kind, device=device)
        if chosen and chosen[-1][2] == tuning:
            chosen[-1][1] = end
        else:
            chosen.append([begin, end, tuning])
    chosen[-1][1] = 1 << 30
    kernels: torch.Tensor = HummingKernel.prepare_kernels(
        config, json.dumps({"gemm_type": kind}), json.dumps(chosen), device
    )
    return kernels
