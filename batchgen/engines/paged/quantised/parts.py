"""The parts of a block of a weight of 4 bits in a Triton kernel: their scales, their numbers, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

from batchgen.engines.paged.quantised.nibbles import prepare_zeros, widen_e2m1, widen_int4, widen_scaled_e2m1
from batchgen.engines.paged.quantised.packed import Packed
from batchgen.engines.paged.quantised.packing import BLOCK, PART


def count_groups(group: int) -> int:
    """Returns how many scales a row has in a block; as many as parts, if groups do not end with blocks."""
    if group % BLOCK == 0:
        return 1
    return BLOCK // (group if BLOCK % group == 0 else PART)


def find_group(weight: Packed, columns: int) -> int:
    """Returns how many columns of a packed weight have a scale together; more than there are, if all have one."""
    if weight.form == "mxfp4":
        return PART
    groups = weight.scales.shape[-2]
    return -(-columns // groups) if groups > 1 else 1 << 30


@triton.jit
def _find_group(at, column, rows, groups, GROUP: tl.constexpr):
    """Where the scales and zeros of some rows are, for a column; behind the last one, those of the last."""
    return at + tl.minimum(column // GROUP, groups - 1) * rows


@triton.jit
def _load_scales(scales, at, inside):
    """In float32."""
    return tl.load(scales + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _load_exponents(scales, at, column, rows, inside, PART: tl.constexpr):
    """Those of mxfp4 in the four parts from `column` on, in a word for each row."""
    return tl.load(scales + at + column // (4 * PART) * rows, mask=inside, other=0)


@triton.jit
def _scale_of(exponents, PLACE: tl.constexpr):
    """2^(exponent - 127)."""
    return ((exponents >> 8 * PLACE & 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_four_scales(
    scales, at, column, rows, groups, inside,
    KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Those of four parts of a block, from `column` on; which are the same is known from GROUPS, those of a block."""
    if KIND == "mxfp4":
        exponents = _load_exponents(scales, at, tl.minimum(column, (groups - 1) * 4 * PART), rows, inside, PART)
        first, second = _scale_of(exponents, 0), _scale_of(exponents, 1)
        third, fourth = _scale_of(exponents, 2), _scale_of(exponents, 3)
    else:
        first = _load_scales(scales, _find_group(at, column, rows, groups, GROUP), inside)
        second, third, fourth = first, first, first
        if GROUPS >= 4:
            third = _load_scales(scales, _find_group(at, column + 2 * PART, rows, groups, GROUP), inside)
            fourth = third
        if GROUPS == 8:
            second = _load_scales(scales, _find_group(at, column + PART, rows, groups, GROUP), inside)
            fourth = _load_scales(scales, _find_group(at, column + 3 * PART, rows, groups, GROUP), inside)
    return first, second, third, fourth


@triton.jit
def load_scales(
    scales, at, block, rows, groups, inside,
    KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Those of both halves of a block."""
    column = block * 8 * PART
    low = load_four_scales(scales, at, column, rows, groups, inside, KIND, GROUP, GROUPS, PART)
    high = load_four_scales(scales, at, column + 4 * PART, rows, groups, inside, KIND, GROUP, GROUPS, PART)
    return low, high


@triton.jit
def _load_four_zeros(
    zeros, at, column, rows, groups, inside, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """As `load_four_scales`."""
    first = tl.load(zeros + _find_group(at, column, rows, groups, GROUP), mask=inside, other=0)
    second, third, fourth = first, first, first
    if GROUPS >= 4:
        third = tl.load(zeros + _find_group(at, column + 2 * PART, rows, groups, GROUP), mask=inside, other=0)
        fourth = third
    if GROUPS == 8:
        second = tl.load(zeros + _find_group(at, column + PART, rows, groups, GROUP), mask=inside, other=0)
        fourth = tl.load(zeros + _find_group(at, column + 3 * PART, rows, groups, GROUP), mask=inside, other=0)
    return first, second, third, fourth


@triton.jit
def widen(
    words, zeros, at, column, rows, groups, inside,
    KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr,
    HALF: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Four of the eight parts of a block, from `column` on, less their zeros."""
    if KIND == "mxfp4":
        a, b, c, d = widen_e2m1(words, HALF, DTYPE, ASSEMBLY)
    else:
        if ZEROS:
            first, second, third, fourth = _load_four_zeros(
                zeros, at, column, rows, groups, inside, GROUP, GROUPS, PART
            )
        else:
            first = tl.full(at.shape, 8, tl.int32)
            second, third, fourth = first, first, first
        first = prepare_zeros(first, DTYPE, ASSEMBLY)
        second = prepare_zeros(second, DTYPE, ASSEMBLY)
        third = prepare_zeros(third, DTYPE, ASSEMBLY)
        fourth = prepare_zeros(fourth, DTYPE, ASSEMBLY)
        a, b, c, d = widen_int4(words, (first, second, third, fourth), HALF, DTYPE, ASSEMBLY)
    return a, b, c, d


@triton.jit
def _load_part(at, column, columns, each, there, EVEN: tl.constexpr):
    """The inputs of a part, [PART, TOKENS]."""
    if EVEN:
        part = tl.load(at + column, mask=there[None, :], other=0.0)
    else:
        part = tl.load(at + column, mask=there[None, :] & (each < columns - column)[:, None], other=0.0)
    return part


@triton.jit
def load_half(at, column, columns, each, there, EVEN: tl.constexpr, PART: tl.constexpr):
    """Those of four parts."""
    first = _load_part(at, column, columns, each, there, EVEN)
    second = _load_part(at, column + PART, columns, each, there, EVEN)
    third = _load_part(at, column + 2 * PART, columns, each, there, EVEN)
    fourth = _load_part(at, column + 3 * PART, columns, each, there, EVEN)
    return first, second, third, fourth


@triton.jit
def add_half(sums, numbers, inputs, scales, GROUPS: tl.constexpr, SCALE: tl.constexpr):
    """`sums` and the products of four parts of a block, [ROWS, TOKENS]."""
    a, b, c, d = numbers
    first, second, third, fourth = inputs
    scale_a, scale_b, scale_c, scale_d = scales
    if SCALE:
        sums = tl.dot((a.to(tl.float32) * scale_a[:, None]).to(a.dtype), first, sums)
        sums = tl.dot((b.to(tl.float32) * scale_b[:, None]).to(a.dtype), second, sums)
        sums = tl.dot((c.to(tl.float32) * scale_c[:, None]).to(a.dtype), third, sums)
        sums = tl.dot((d.to(tl.float32) * scale_d[:, None]).to(a.dtype), fourth, sums)
    elif GROUPS <= 2:
        part = tl.dot(d, fourth, tl.dot(c, third, tl.dot(b, second, tl.dot(a, first))))
        sums += part * scale_a[:, None]
    elif GROUPS == 4:
        sums += tl.dot(b, second, tl.dot(a, first)) * scale_a[:, None]
        sums += tl.dot(d, fourth, tl.dot(c, third)) * scale_c[:, None]
    else:
        sums += tl.dot(a, first) * scale_a[:, None]
        sums += tl.dot(b, second) * scale_b[:, None]
        sums += tl.dot(c, third) * scale_c[:, None]
        sums += tl.dot(d, fourth) * scale_d[:, None]
    return sums


@triton.jit
def multiply_half(
    sums, words, ahead, scales, zeros, inputs_at, at, column, columns, rows, groups, inside, each, there,
    HALF: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PART: tl.constexpr, EVEN: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """`sums` and the products of half a block, which begins with `column`; `ahead` are its scales.

    Numbers that are scaled before the product are scaled where matrix units want them: there, scales are read anew.
    """
    parts = load_half(inputs_at, column, columns, each, there, EVEN, PART)
    if SCALE and KIND == "mxfp4":
        exponents = _load_exponents(scales, at, column, rows, inside, PART)
        a, b, c, d = widen_scaled_e2m1(words, exponents, HALF)
        first, second, third, fourth = parts
        sums = tl.dot(d, fourth, tl.dot(c, third, tl.dot(b, second, tl.dot(a, first, sums))))
    else:
        if SCALE:
            ahead = load_four_scales(scales, at, column, rows, groups, inside, KIND, GROUP, GROUPS, PART)
        numbers = widen(
            words, zeros, at, column, rows, groups, inside, KIND, ZEROS, GROUP, GROUPS, PART, HALF, DTYPE, ASSEMBLY
        )
        sums = add_half(sums, numbers, parts, ahead, GROUPS, SCALE)
    return sums


@triton.jit
def load_words(at, inside, ONCE: tl.constexpr):
    """Those of a block; if they are read ONCE, they need not stay in the cache."""
    if ONCE:
        words = tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")
    else:
        words = tl.load(at, mask=inside[:, None], other=0)
    return words
