"""The operators: products of quantised weights, of a linear layer and of sorted pairs with their experts.

Which way a product is computed depends on the number of tokens, which the compiler leaves open; so each is an operator
that decides when it runs, by shapes alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F

from batchgen.engines.paged.adapters import LayerAdapters, add_to
from batchgen.engines.paged.experts.grouped_gemm import Sorting
from batchgen.engines.paged.quantised import humming_products
from batchgen.engines.paged.quantised.packed import HUMMING, PLAIN, Packed
from batchgen.engines.paged.quantised.rounding import widen_inputs
from batchgen.models.quantised.weight import Kind, QuantisedWeight

FEW_TOKENS = 256
"""Most tokens of a product of 8-bit floats by our kernel; more are torch's scaled product. On an H200 28,672 rows of
4,096 columns take ours 80 us with 256 tokens, and torch's 135; where they meet has not been measured."""

MANY_TOKENS = 256
"""Most tokens of a product that widens weights in registers; for more, they are widened for a product of the library.
On an H200 a layer of Llama-8B takes 353 us with 256 tokens, of 4 bits; where the ways meet has not been measured."""

_WIDENED_BYTES = 256 << 20  # at once
_ROWS_AT_ONCE = 1024  # of a weight that is widened in plain torch


def multiply(
    inputs: torch.Tensor,
    input_scales: torch.Tensor | None,
    weight: Packed,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `torch.nn.functional.linear`, with sums of float32 or, of 8-bit integers, int32.

    Args:
        inputs: [..., columns]: as they are, or rounded to 8 bits, with `input_scales` [..., groups].
        weight: of [rows, columns].
        dtype: of the result, [..., rows].
    """
    output: torch.Tensor = torch.ops.batchgen.quantised_product(
        inputs, input_scales, weight.values, weight.scales, weight.zeros, bias, weight.form, dtype
    )
    return output


def multiply_adapted(
    inputs: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor | None],
    weight: Packed,
    bias: torch.Tensor | None,
    adapters: LayerAdapters,
) -> torch.Tensor:
    """As `multiply`, of `stored` inputs and their scales, with what each token's adapter adds for `inputs`."""
    output: torch.Tensor = torch.ops.batchgen.adapted_quantised_product(
        inputs, *stored, weight.values, weight.scales, weight.zeros, bias, weight.form, *adapters
    )
    return output


def multiply_grouped(
    stored: tuple[torch.Tensor, torch.Tensor | None],
    weight: Packed,
    bias: torch.Tensor | None,
    sorting: Sorting,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `experts.grouped_gemm.multiply`, of `stored` inputs and their scales and experts' [experts, rows, columns]."""
    output: torch.Tensor = torch.ops.batchgen.quantised_grouped_product(
        *stored, weight.values, weight.scales, weight.zeros, bias, weight.form, dtype, *sorting
    )
    return output


def multiply_in_slices(
    inputs: torch.Tensor,
    input_scales: torch.Tensor | None,
    weight: Packed,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `multiply`, of a weight that is not packed, in float32: the reference of kernels."""
    whole = QuantisedWeight(cast(Kind, weight.form.removeprefix(PLAIN)), weight.values, weight.scales, weight.zeros)
    wide, rows = widen_inputs(inputs, input_scales), whole.shape[0]
    parts = []
    for begin in range(0, rows, _ROWS_AT_ONCE):
        some = whole.cut_rows(begin, min(_ROWS_AT_ONCE, rows - begin))
        parts.append(F.linear(wide, some.widen()))
    output = torch.cat(parts, -1)
    return (output if bias is None else output + bias.float()).to(dtype)


def _multiply(inputs: torch.Tensor, input_scales: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    """The operator's implementation; the rest are the weight's tensors, the bias, the weight's form, and the type."""
    values, scales, zeros, bias, form, dtype = rest
    weight = Packed(form, values, scales, zeros)
    if form.startswith(PLAIN):
        return multiply_in_slices(inputs, input_scales, weight, bias, dtype)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if input_scales is not None:
        input_scales = input_scales.reshape(-1, input_scales.shape[-1])
    output = _multiply_packed(rows, input_scales, weight, bias, dtype)
    return output.view(*inputs.shape[:-1], output.shape[-1])


def _multiply_packed(
    inputs: torch.Tensor,
    input_scales: torch.Tensor | None,
    weight: Packed,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[tokens, rows]: by the kernel that is fastest for so many tokens."""
    if weight.form.startswith(HUMMING):
        return humming_products.multiply(inputs, weight, bias)
    from batchgen.engines.paged.quantised import (  # Triton comes with a torch for GPUs alone
        eight_bits_kernel,
        four_bits_kernel,
        programs,
    )

    if input_scales is None:
        if len(inputs) > MANY_TOKENS:
            return multiply_widened(inputs, weight, bias)
        if weight.form in ("fp8", "int8"):
            return eight_bits_kernel.multiply(inputs, None, weight, bias, eight_bits_kernel.Wanted(dtype))
        return four_bits_kernel.multiply(inputs, weight, bias)
    fits = _fits_torch(inputs, input_scales, weight, dtype) and programs.has_sm_90(inputs.device)
    if len(inputs) > FEW_TOKENS and fits:
        return multiply_in_torch(inputs, input_scales, weight, bias, dtype)
    return eight_bits_kernel.multiply(inputs, input_scales, weight, bias, eight_bits_kernel.Wanted(dtype))


def _fits_torch(inputs: torch.Tensor, input_scales: torch.Tensor, weight: Packed, dtype: torch.dtype) -> bool:
    """Whether `multiply_in_torch` takes these: floats of 8 bits with a scale for each row, in rows of 16 bytes."""
    by_row = input_scales.shape[-1] == 1 and weight.scales.shape[-2] == 1 and weight.form == "fp8"
    even = all(size % 16 == 0 for size in weight.values.shape)
    return by_row and even and inputs.is_contiguous() and dtype.itemsize == 2


def multiply_in_torch(
    inputs: torch.Tensor,
    input_scales: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `multiply`, of [tokens, columns] in floats of 8 bits with a scale for each row, by torch's scaled product."""
    other: dict[str, Any] = {"scale_a": input_scales, "scale_b": weight.scales, "bias": bias, "out_dtype": dtype}
    output: torch.Tensor = torch._scaled_mm(inputs, weight.values.t(), **other)
    return output


def multiply_widened(
    inputs: torch.Tensor, weight: Packed, bias: torch.Tensor | None, at_once: int = _WIDENED_BYTES
) -> torch.Tensor:
    """As `multiply`, of [tokens, columns]: by the library's product, of some rows in 16 bits after others."""
    from batchgen.engines.paged.quantised import widening_kernel

    rows, (tokens, columns) = weight.values.shape[-2], inputs.shape
    step = max(256, at_once // (columns * inputs.element_size()) // 256 * 256)
    if step >= rows:
        return F.linear(inputs, widening_kernel.widen(weight, columns, inputs.dtype), bias)
    output = torch.empty((tokens, rows), dtype=inputs.dtype, device=inputs.device)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        wide = widening_kernel.widen(weight, columns, inputs.dtype, begin, end)
        torch.mm(inputs, wide.t(), out=output[:, begin:end])
        del wide  # the next is made in the same place
    return output if bias is None else output.add_(bias)


def _multiply_adapted(inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The operator's implementation; the rest are what `_multiply` takes, but for the type, and the adapters."""
    *given, down, up = rest
    output = _multiply(*given, inputs.dtype)
    add_to(output, inputs, LayerAdapters(down, up))
    return output


def _multiply_grouped(inputs: torch.Tensor, input_scales: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    """The operator's implementation; the rest are what `_multiply` takes, and the parts of a `Sorting`."""
    values, scales, zeros, bias, form, dtype, *sorted_pairs = rest
    weight, sorting = Packed(form, values, scales, zeros), Sorting(*sorted_pairs)
    if form.startswith(PLAIN):
        return multiply_grouped_in_loop((inputs, input_scales), weight, bias, sorting, dtype)
    if form.startswith(HUMMING):
        return humming_products.multiply(inputs, weight, bias, sorting)
    from batchgen.engines.paged.quantised import eight_bits_kernel, four_bits_kernel  # Triton comes with a GPU's torch

    if form in ("fp8", "int8"):
        return eight_bits_kernel.multiply(inputs, input_scales, weight, bias, eight_bits_kernel.Wanted(dtype, sorting))
    return four_bits_kernel.multiply(inputs, weight, bias, sorting)


def multiply_grouped_in_loop(
    stored: tuple[torch.Tensor, torch.Tensor | None],
    weight: Packed,
    bias: torch.Tensor | None,
    sorting: Sorting,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `multiply_grouped`, of weights that are not packed, one product for each expert that has pairs."""
    rows, row_scales = stored
    if sorting.top_k:
        token = sorting.order // sorting.top_k
        rows, row_scales = rows[token], None if row_scales is None else row_scales[token]
    output = rows.new_empty((len(rows), weight.values.shape[-2]), dtype=dtype)
    for expert, (begin, end) in enumerate(pairwise(sorting.offsets.tolist())):
        if begin < end:
            zeros = None if weight.zeros is None else weight.zeros[expert]
            one = Packed(weight.form, weight.values[expert], weight.scales[expert], zeros)
            some = rows[begin:end], None if row_scales is None else row_scales[begin:end]
            output[begin:end] = multiply_in_slices(*some, one, None if bias is None else bias[expert], dtype)
    return output


def _count_rows(values: torch.Tensor, form: str) -> int:
    return humming_products.count_rows(form) if form.startswith(HUMMING) else values.shape[-2]


def _make_output(inputs: torch.Tensor, _scales: object, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], _count_rows(values, rest[3])), dtype=rest[4])


def _make_adapted_output(
    inputs: torch.Tensor, _stored: object, _scales: object, values: torch.Tensor, *rest: Any
) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], _count_rows(values, rest[3])))


def _make_grouped_output(inputs: torch.Tensor, _scales: object, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return inputs.new_empty((rest[5].shape[0], _count_rows(values, rest[3])), dtype=rest[4])


_WEIGHT = "Tensor? input_scales, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, str form"
_OPERATORS: dict[str, tuple[str, Any, Any]] = {
    "quantised_product": (f"Tensor inputs, {_WEIGHT}, ScalarType dtype", _multiply, _make_output),
    "adapted_quantised_product": (
        f"Tensor inputs, Tensor stored, {_WEIGHT}, Tensor down, Tensor up", _multiply_adapted, _make_adapted_output
    ),
    "quantised_grouped_product": (
        f"Tensor inputs, {_WEIGHT}, ScalarType dtype, Tensor order, Tensor offsets, int top_k",
        _multiply_grouped,
        _make_grouped_output,
    ),
}  # fmt: skip
_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, (_arguments, _implementation, _fake) in _OPERATORS.items():
    _library.define(f"{_name}({_arguments}) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"batchgen::{_name}", _fake, lib=_library)
