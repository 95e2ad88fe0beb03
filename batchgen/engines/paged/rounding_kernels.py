"""Keys and values of 8 bits in the kernels, in Triton: the same numbers as those of `rounding`.

A number is loaded as its byte, and widened to float16, in which it is exact and for which a GPU has an instruction; its
scale multiplies the score, or the weight of the value. Products are those of float16, never of 8 bits, whose sums are
short. bfloat16 would take three instructions more a number. Numbers are rounded by whole-number arithmetic, so that
the interpreter, which rounds otherwise, has the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(255)  # `rounding.NOT_FINITE`


@triton.jit
def round_row(wide):
    """A key or value of one head: its numbers [WIDE], as bytes, and its exponent. `wide` is float32, [WIDE]."""
    largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # as bits, among which NaN is the largest
    finite = largest < 0x7F800000
    # The exponent, plus one beyond the mantissa of 448, less the exponent of 448.
    exponent = tl.maximum(((tl.where(finite, largest, 0) + 0x1FFFFF) >> 23) - 8, 1)
    scaled = tl.where(finite, wide * ((254 - exponent) << 23).to(tl.float32, bitcast=True), 0.0)
    return _round_to_bytes(scaled), tl.where(finite, exponent, NOT_FINITE).to(tl.uint8)


@triton.jit
def _round_to_bytes(scaled):
    """float32 numbers of at most 448 as the bytes of float8_e4m3fn, to the nearest, and to even between two."""
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of the mantissa stay, of 23; the exponent's bias becomes 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the numbers are multiples of 2**-9: adding 1.5 * 2**23 rounds to a whole number, in the low bits.
    small = (tl.abs(scaled) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def widen(numbers, exponent):
    """What `round_row` has made of a key or value, in float32; NaN if it was not finite."""
    return numbers.to(tl.float8e4nv, bitcast=True).to(tl.float32) * find_scales(exponent)


@triton.jit
def find_scales(exponents):
    """2 ** (exponent - 127); NaN of what is not finite."""
    exponents = exponents.to(tl.int32)
    scales = (exponents << 23).to(tl.float32, bitcast=True)
    return tl.where(exponents == NOT_FINITE, float("nan"), scales)


@triton.jit
def share_scales(exponents, NEEDS_FINITE: tl.constexpr):
    """The scales of several values as parts of the largest one, [KEYS], and that largest one.

    A weight times its part is at most 1, as far below it as float16 reaches.

    Args:
        NEEDS_FINITE: where a value is not finite the part is a number all the same, instead of NaN.
    """
    exponents = exponents.to(tl.int32)
    finite = exponents != NOT_FINITE
    usable = tl.where(finite, exponents, 1)
    largest = tl.max(usable, 0)
    parts = (tl.maximum(usable - largest + 127, 0) << 23).to(tl.float32, bitcast=True)
    if not NEEDS_FINITE:
        parts = tl.where(finite, parts, float("nan"))
    return parts, (largest << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_queries(queries):
    """Queries [rows, WIDE] in a type of products that has all numbers of 8 bits, and what each row is a multiple of.

    float16 has not the range of bfloat16: the largest number of a row becomes one between 1 and 2. float32 stays.
    """
    wide = queries.to(tl.float32)
    largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponents = tl.minimum(tl.maximum(largest >> 23, 1), 253)
    if queries.dtype == tl.float32:
        exponents = exponents * 0 + 127
    scaled = wide * ((254 - exponents) << 23).to(tl.float32, bitcast=True)[:, None]
    scales = (exponents << 23).to(tl.float32, bitcast=True)
    if queries.dtype != tl.float32:
        return scaled.to(tl.float16), scales
    return scaled, scales
