"""Keys and values of 8 bits in the kernels, in Triton: the same numbers as those of `rounding`.

A number is loaded as its byte, and widened to float16, in which it is exact and for which a GPU has an instruction;
bfloat16 would take three more a number. The scale of a key multiplies its score, that of a value its weight. Products
are those of float16, never of 8 bits, whose sums are short. Numbers are rounded by whole-number arithmetic, so that
the interpreter, which rounds otherwise, has the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(255)  # `rounding.NOT_FINITE`
_LEAST = tl.constexpr(20)  # the lowest exponent that counts in sums of values: a scale of 2**-107
_ROOM = tl.constexpr(14)  # weights are scaled by 2**14, since normal numbers of float16 go from 2**-14 to 2**16
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without instructions of a GPU


@triton.jit
def round_row(wide):
    """A key or value of one head: its numbers [WIDE], as bytes, and its exponent. `wide` is float32, [WIDE].

    The numbers of what is not finite are 0, so that they times the scale of `find_scales` are NaN.
    """
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
def widen_bytes(numbers):
    """Bytes of float8_e4m3fn as float16.

    On a GPU by an instruction that the compiler does not see through: it would widen numbers only where the product
    takes them, and read them byte by byte from shared memory, which takes a fifth more instructions in all.
    """
    if _IS_INTERPRETED:
        wide = numbers.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r", [numbers], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    return wide


@triton.jit
def widen_row(numbers):
    """What `round_row` has made of numbers, in float32 and without their scale."""
    return numbers.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def load_exponents(key_exponents, value_exponents, rows, there):
    """The exponents of keys and of values in these rows, [KEYS] each; 1 where none is there.

    In one load, which has numbers for all threads: of one with fewer, each thread would load all that it needs.
    """
    half = tl.arange(0, 2)[None, :]
    exponents = tl.where(half == 0, key_exponents + rows[:, None], value_exponents + rows[:, None])
    return tl.split(tl.load(exponents, mask=there[:, None] & (half >= 0), other=1).to(tl.int32))


@triton.jit
def find_scales(exponents):
    """2 ** (exponent - 127); infinite of what is not finite."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def share_scales(exponents, unit, NEEDS_FINITE: tl.constexpr):
    """The largest of `unit` and these exponents of values, and how many of it, times 2**_ROOM, a scale is, [KEYS].

    Weights times that are numbers of float16; what is too small for it is nothing beside the largest value.

    Args:
        NEEDS_FINITE: where a value is not finite its number is finite all the same, instead of NaN.
    """
    finite = exponents != NOT_FINITE
    usable = tl.where(finite, exponents, 1)
    unit = tl.maximum(unit, tl.max(usable, 0))
    shares = (tl.maximum(usable - unit + (127 + _ROOM), 0) << 23).to(tl.float32, bitcast=True)
    if not NEEDS_FINITE:
        shares = tl.where(finite, shares, float("nan"))
    return unit, shares


@triton.jit
def find_ratio(unit, higher):
    """2 ** (unit - higher): what a sum in units of one exponent is multiplied by to be one of a higher exponent's."""
    return (tl.maximum(unit - higher + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def find_unit(unit, ROUNDED: tl.constexpr):
    """What a sum of values is multiplied by in the end that was made of the shares of this exponent."""
    factor = 1.0
    if ROUNDED:
        factor = ((unit - _ROOM) << 23).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def scale_queries(queries, ROUNDED: tl.constexpr):
    """Queries [rows, WIDE] in a type of products that has all numbers of 8 bits; what they are multiples of; and the
    unit of a sum of no values.

    float16 has not the range of bfloat16: the largest number becomes one between 2**14 and 2**15. float32 stays.
    """
    scale, unit = 1.0, tl.full([], _LEAST, tl.int32)
    if ROUNDED and queries.dtype != tl.float32:
        wide = queries.to(tl.float32)
        largest = tl.max(tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
        exponent = tl.minimum(tl.maximum((largest >> 23) - 14, 1), 253)
        queries = (wide * ((254 - exponent) << 23).to(tl.float32, bitcast=True)).to(tl.float16)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return queries, scale, unit
