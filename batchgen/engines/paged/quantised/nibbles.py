"""Numbers of 4 bits to 16 bits, in the registers of a Triton kernel.

The compiler converts integers to floats one by one, which takes longer than reading them. So a GPU puts two nibbles at
once into the mantissas of two floats of 128 (bfloat16) or 1,024 (float16) by two instructions, and one more subtracts
that and the zero; floats of 4 bits become the top of a tiny float, which one multiplication makes the right one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0 to $3: four of the eight numbers of two words, each of both words, in 16 bits; $4, $5: the words; of "int4", then
# what is subtracted from each of the four, in the low halves of two words. All are read before the first is written,
# which may be in the place of one. `prmt` takes halves of two words, and 0xEA is (a & b) | c.
_INT4 = """{{
    .reg .b32 a, b, first, second, third, fourth;
    prmt.b32 a, $4, $5, {halves};
    prmt.b32 first, $6, $7, 0x5410;
    prmt.b32 second, $8, $9, 0x5410;
    prmt.b32 third, $10, $11, 0x5410;
    prmt.b32 fourth, $12, $13, 0x5410;
    lop3.b32 b, a, 0x000f000f, {one}, 0xEA;
    {subtract} $0, b, first;
    shr.u32 a, a, 4;
    lop3.b32 b, a, 0x000f000f, {one}, 0xEA;
    {subtract} $1, b, second;
    shr.u32 a, a, 4;
    lop3.b32 b, a, 0x000f000f, {one}, 0xEA;
    {subtract} $2, b, third;
    shr.u32 a, a, 4;
    lop3.b32 b, a, 0x000f000f, {one}, 0xEA;
    {subtract} $3, b, fourth;
}}"""
_E2M1 = """{{
    .reg .b32 a, b, c, factor;
    mov.b32 factor, {factor};
    prmt.b32 a, $4, $5, {halves};
    shl.b32 b, a, 12;
    and.b32 b, b, 0x80008000;
    {move_0};
    lop3.b32 b, c, {bits}, b, 0xEA;
    {multiply} $0, b, factor;
    shl.b32 b, a, 8;
    and.b32 b, b, 0x80008000;
    {move_1};
    lop3.b32 b, c, {bits}, b, 0xEA;
    {multiply} $1, b, factor;
    shl.b32 b, a, 4;
    and.b32 b, b, 0x80008000;
    {move_2};
    lop3.b32 b, c, {bits}, b, 0xEA;
    {multiply} $2, b, factor;
    and.b32 b, a, 0x80008000;
    {move_3};
    lop3.b32 b, c, {bits}, b, 0xEA;
    {multiply} $3, b, factor;
}}"""
_SCALED_E2M1 = (
    _E2M1.replace(
        "    .reg .b32 a, b, c, factor;\n    mov.b32 factor, {factor};\n",
        """    .reg .b32 a, b, c, first, second, third, fourth;
    prmt.b32 first, $6, $7, 0x5410;
    prmt.b32 second, $8, $9, 0x5410;
    prmt.b32 third, $10, $11, 0x5410;
    prmt.b32 fourth, $12, $13, 0x5410;
""",
    )
    .replace("$0, b, factor", "$0, b, first")
    .replace("$1, b, factor", "$1, b, second")
    .replace("$2, b, factor", "$2, b, third")
    .replace("$3, b, factor", "$3, b, fourth")
)
_BFLOAT16 = {"one": "0x43004300", "subtract": "sub.rn.bf16x2"}
_FLOAT16 = {"one": "0x64006400", "subtract": "sub.rn.f16x2"}
_BFLOAT16_E2M1 = {
    "factor": "0x7E807E80", "bits": "0x01C001C0", "multiply": "mul.rn.bf16x2",
    "move_0": "shl.b32 c, a, 6", "move_1": "shl.b32 c, a, 2", "move_2": "shr.u32 c, a, 2", "move_3": "shr.u32 c, a, 6",
}  # fmt: skip
_FLOAT16_E2M1 = {
    "factor": "0x74007400", "bits": "0x0E000E00", "multiply": "mul.rn.f16x2",
    "move_0": "shl.b32 c, a, 9", "move_1": "shl.b32 c, a, 5", "move_2": "shl.b32 c, a, 1", "move_3": "shr.u32 c, a, 3",
}  # fmt: skip
_LOW, _HIGH = {"halves": "0x5410"}, {"halves": "0x7632"}
_INT4_BFLOAT16_LOW = tl.constexpr(_INT4.format(**_LOW, **_BFLOAT16))
_INT4_BFLOAT16_HIGH = tl.constexpr(_INT4.format(**_HIGH, **_BFLOAT16))
_INT4_FLOAT16_LOW = tl.constexpr(_INT4.format(**_LOW, **_FLOAT16))
_INT4_FLOAT16_HIGH = tl.constexpr(_INT4.format(**_HIGH, **_FLOAT16))
_E2M1_BFLOAT16_LOW = tl.constexpr(_E2M1.format(**_LOW, **_BFLOAT16_E2M1))
_E2M1_BFLOAT16_HIGH = tl.constexpr(_E2M1.format(**_HIGH, **_BFLOAT16_E2M1))
_E2M1_FLOAT16_LOW = tl.constexpr(_E2M1.format(**_LOW, **_FLOAT16_E2M1))
_E2M1_FLOAT16_HIGH = tl.constexpr(_E2M1.format(**_HIGH, **_FLOAT16_E2M1))
_SCALED_E2M1_LOW = tl.constexpr(_SCALED_E2M1.format(**_LOW, **_BFLOAT16_E2M1))
_SCALED_E2M1_HIGH = tl.constexpr(_SCALED_E2M1.format(**_HIGH, **_BFLOAT16_E2M1))
_OF_E2M1 = tl.constexpr("=r,=r,=r,=r,r,r")
_WITH_FOUR = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r")


@triton.jit
def prepare_zeros(zeros, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What `widen_int4` subtracts: of assembly, 128 + zero (or 1,024 + zero), in 16 bits."""
    if ASSEMBLY:
        if DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300
            zeros = zeros | 0x4300
        else:
            zeros = zeros | 0x6400
    return zeros


@triton.jit
def widen_int4(words, zeros, HALF: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Four of the eight numbers of each of `words` [rows, columns], less their zeros, as DTYPE.

    Args:
        zeros: four of [rows], int32: those of `prepare_zeros`.
        HALF: 0: the first four; 1: the others.
    """
    first, second, third, fourth = zeros
    if ASSEMBLY:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4_BFLOAT16_HIGH if HALF else _INT4_BFLOAT16_LOW, _WITH_FOUR,
                [words, first[:, None], second[:, None], third[:, None], fourth[:, None]],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4_FLOAT16_HIGH if HALF else _INT4_FLOAT16_LOW, _WITH_FOUR,
                [words, first[:, None], second[:, None], third[:, None], fourth[:, None]],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        a = (((words >> 16 * HALF) & 15) - first[:, None]).to(DTYPE)
        b = (((words >> 16 * HALF + 4) & 15) - second[:, None]).to(DTYPE)
        c = (((words >> 16 * HALF + 8) & 15) - third[:, None]).to(DTYPE)
        d = (((words >> 16 * HALF + 12) & 15) - fourth[:, None]).to(DTYPE)
    return a, b, c, d


@triton.jit
def widen_e2m1(words, HALF: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """As `widen_int4`, of floats of 4 bits."""
    if ASSEMBLY:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_BFLOAT16_HIGH if HALF else _E2M1_BFLOAT16_LOW, _OF_E2M1, [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_FLOAT16_HIGH if HALF else _E2M1_FLOAT16_LOW, _OF_E2M1, [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    else:
        a = _widen_one_e2m1(words >> 16 * HALF).to(DTYPE)
        b = _widen_one_e2m1(words >> 16 * HALF + 4).to(DTYPE)
        c = _widen_one_e2m1(words >> 16 * HALF + 8).to(DTYPE)
        d = _widen_one_e2m1(words >> 16 * HALF + 12).to(DTYPE)
    return a, b, c, d


@triton.jit
def widen_scaled_e2m1(words, exponents, HALF: tl.constexpr):
    """As `widen_e2m1`, by assembly, in bfloat16, times their scales: `exponents` [rows] are a word of four each."""
    a, b, c, d = tl.inline_asm_elementwise(
        _SCALED_E2M1_HIGH if HALF else _SCALED_E2M1_LOW, _WITH_FOUR,
        [
            words, (((exponents & 255) + 126) << 7)[:, None], (((exponents >> 8 & 255) + 126) << 7)[:, None],
            (((exponents >> 16 & 255) + 126) << 7)[:, None], (((exponents >> 24 & 255) + 126) << 7)[:, None],
        ],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    return a, b, c, d


@triton.jit
def _widen_one_e2m1(words):
    """Two bits of exponent and one of mantissa make a float32 of the same bits, but for 0 and 0.5."""
    size = words & 7
    value = tl.where(size == 1, 0.5, ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True))
    value = tl.where(size == 0, 0.0, value)
    return tl.where((words & 8) > 0, -value, value)
