"""Numbers of 4 bits to 16 bits, in the registers of a Triton kernel.

The compiler converts integers to floats one by one, which takes longer than reading them. So a GPU puts two nibbles at
once into the mantissas of two floats of 128 (bfloat16) or 1,024 (float16) by two instructions, and one more subtracts
that and the zero; floats of 4 bits become the top of a tiny float, which one multiplication makes the right one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0, $1: the low nibbles of four bytes, two numbers of 16 bits each; $2, $3: the high ones; $4: the bytes; of "int4"
# then the low and the high nibbles' zeros + 128 (or 1,024). `prmt` puts two bytes into the halves of a register,
# and 0xEA is (a & b) | c.
_SPREAD = """
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
"""
_INT4 = """{{{spread}
    shr.u32 c, a, 4;
    shr.u32 d, b, 4;
    lop3.b32 a, a, 0x000f000f, {one}, 0xEA;
    lop3.b32 b, b, 0x000f000f, {one}, 0xEA;
    lop3.b32 c, c, 0x000f000f, {one}, 0xEA;
    lop3.b32 d, d, 0x000f000f, {one}, 0xEA;
    {subtract} $0, a, $5;
    {subtract} $1, b, $6;
    {subtract} $2, c, $7;
    {subtract} $3, d, $8;
}}"""
_E2M1 = """{{{spread}
    .reg .b32 s, t, factor;
    mov.b32 factor, {factor};
    shl.b32 s, a, 12; and.b32 s, s, 0x80008000;
    shl.b32 t, a, {low}; lop3.b32 s, t, {bits}, s, 0xEA;
    {multiply} $0, s, factor;
    shl.b32 s, b, 12; and.b32 s, s, 0x80008000;
    shl.b32 t, b, {low}; lop3.b32 s, t, {bits}, s, 0xEA;
    {multiply} $1, s, factor;
    shl.b32 s, a, 8; and.b32 s, s, 0x80008000;
    shl.b32 t, a, {high}; lop3.b32 s, t, {bits}, s, 0xEA;
    {multiply} $2, s, factor;
    shl.b32 s, b, 8; and.b32 s, s, 0x80008000;
    shl.b32 t, b, {high}; lop3.b32 s, t, {bits}, s, 0xEA;
    {multiply} $3, s, factor;
}}"""
_BFLOAT16 = {"one": "0x43004300", "subtract": "sub.rn.bf16x2"}
_FLOAT16 = {"one": "0x64006400", "subtract": "sub.rn.f16x2"}
_BFLOAT16_E2M1 = {"factor": "0x7E807E80", "low": 6, "high": 2, "bits": "0x01C001C0", "multiply": "mul.rn.bf16x2"}
_FLOAT16_E2M1 = {"factor": "0x74007400", "low": 9, "high": 5, "bits": "0x0E000E00", "multiply": "mul.rn.f16x2"}
_INT4_BFLOAT16 = tl.constexpr(_INT4.format(spread=_SPREAD, **_BFLOAT16))
_INT4_FLOAT16 = tl.constexpr(_INT4.format(spread=_SPREAD, **_FLOAT16))
_E2M1_BFLOAT16 = tl.constexpr(_E2M1.format(spread=_SPREAD, **_BFLOAT16_E2M1))
_E2M1_FLOAT16 = tl.constexpr(_E2M1.format(spread=_SPREAD, **_FLOAT16_E2M1))
_OUT_IN = tl.constexpr("=r,=r,=r,=r,r")
_OUT_IN_ZEROS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")


@triton.jit
def widen_int4(bytes, low_zero, high_zero, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The low and the high nibbles of `bytes` [rows, half], less their zeros, [rows] in float32, as DTYPE."""
    if ASSEMBLY:
        if DTYPE == tl.bfloat16:
            low_zero = (low_zero + 128.0).to(DTYPE)[:, None]
            high_zero = (high_zero + 128.0).to(DTYPE)[:, None]
            low, high = tl.inline_asm_elementwise(
                _INT4_BFLOAT16, _OUT_IN_ZEROS, [bytes, low_zero, high_zero],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            low_zero = (low_zero + 1024.0).to(DTYPE)[:, None]
            high_zero = (high_zero + 1024.0).to(DTYPE)[:, None]
            low, high = tl.inline_asm_elementwise(
                _INT4_FLOAT16, _OUT_IN_ZEROS, [bytes, low_zero, high_zero],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        low = (bytes & 15).to(DTYPE) - low_zero.to(DTYPE)[:, None]
        high = (bytes >> 4).to(DTYPE) - high_zero.to(DTYPE)[:, None]
    return low, high


@triton.jit
def widen_e2m1(bytes, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The low and the high nibbles of `bytes`, floats of 4 bits, as DTYPE."""
    if ASSEMBLY:
        if DTYPE == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                _E2M1_BFLOAT16, _OUT_IN, [bytes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _E2M1_FLOAT16, _OUT_IN, [bytes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        low = _widen_one_e2m1((bytes & 15).to(tl.uint32)).to(DTYPE)
        high = _widen_one_e2m1((bytes >> 4).to(tl.uint32)).to(DTYPE)
    return low, high


@triton.jit
def _widen_one_e2m1(bits):
    """Two bits of exponent and one of mantissa make a float32 of the same bits, but for 0 and 0.5."""
    size = bits & 7
    value = tl.where(size == 1, 0.5, ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True))
    value = tl.where(size == 0, 0.0, value)
    return tl.where(bits > 7, -value, value)
