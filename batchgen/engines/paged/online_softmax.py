"""Softmax over keys that come in parts, as the attention `kernels` compute it, in Triton.

For each query there are the largest score so far, the sum of the exponentials relative to it, and the values that were
added up with those as weights. The hardware computes exp2, so scores are in units of its exponent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchgen.engines.paged.rounding_kernels import (
    NOT_FINITE,
    find_ratio,
    find_scales,
    load_exponents,
    round_row,
    share_scales,
    widen_bytes,
    widen_row,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cap(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP), in units of exp2's exponent before and after.

    tanh(x) = 1 - 2 / (exp(2 x) + 1), whose absolute error is that of float32 at 1. A score of infinity becomes NaN: it
    comes from a broken key, which the cap would hide.
    """
    return SOFTCAP * LOG2_E * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / SOFTCAP)) + 1.0)) + (scores - scores)


@triton.jit
def _load(half, stride, page, others, there, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr):
    """Keys or values of one head at the places `others`, whose pages these are: [KEYS, WIDE], 0 where none is there."""
    rows = page * stride + (others % PAGE) * SIZE
    each = tl.arange(0, WIDE)
    inside = there[:, None] if SIZE == WIDE else there[:, None] & (each < SIZE)[None, :]
    return tl.load((half + rows)[:, None] + each[None, :], mask=inside, other=0)


@triton.jit
def add_keys(
    query, query_scale, best, total, mixed, unit, begin, end, first_seen, places, slope, pages, keys, values,
    key_exponents, value_exponents, first_row, key_page, value_page, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, SIZE_V: tl.constexpr, WIDE_V: tl.constexpr, PAGE: tl.constexpr,
    ROUNDED: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `begin` on to the running maximum, sum and mix of values of each query.

    If they are ROUNDED, `query` and `query_scale` are as `scale_queries` gives them, `mixed` is in units of `unit`
    (`share_scales`), and `first_row` is that of the head among a page's exponents; else these three mean nothing.
    """
    others = begin + tl.arange(0, KEYS)
    there = (others < end) & (others >= first_seen)
    page = tl.load(pages + others // PAGE, mask=there, other=0).to(tl.int64)
    key = _load(keys, key_page, page, others, there, SIZE, WIDE, PAGE)
    # Values are under way while the scores are worked out. Where sizes are equal, so are places, and found once.
    value = _load(values, key_page if SIZE == SIZE_V else value_page, page, others, there, SIZE_V, WIDE_V, PAGE)
    if ROUNDED:
        rows = page * (key_page // SIZE) + first_row + others % PAGE
        exponents, exponents_v = load_exponents(key_exponents, value_exponents, rows, there)
        key = widen_bytes(key).to(query.dtype)
        value = widen_bytes(value).to(query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if ROUNDED:
        scores *= (find_scales(exponents) * (query_scale * SCALE))[None, :]
    else:
        scores *= SCALE
    if SOFTCAP > 0:
        scores = _cap(scores, SOFTCAP)
    if ALIBI:
        scores += slope[:, None] * (others[None, :] - places[:, None]).to(tl.float32)
    seen = there[None, :]
    if CAUSAL:
        seen = seen & (others[None, :] <= places[:, None])
    if WINDOW:
        seen = seen & (others[None, :] > places[:, None] - WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    if CAUSAL or WINDOW:
        # A value that is NaN would reach the queries that do not see it, too: 0 * NaN is NaN.
        if ROUNDED:
            broken = tl.where(exponents_v == NOT_FINITE, 1, 0)
        else:
            finite = (value - value) == 0.0
            value = tl.where(finite, value, 0.0).to(value.dtype)
            broken = tl.max(tl.where(finite, 0, 1), 1)
        mixed = tl.where(tl.max(tl.where(seen, broken[None, :], 0), 1)[:, None] > 0, float("nan"), mixed)
    higher = tl.maximum(best, tl.max(scores, 1))
    # While a query has seen no key at all, its maximum is -inf, and -inf - -inf is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(best - base)
    weights = tl.exp2(scores - base[:, None])
    if ROUNDED:
        before = unit
        unit, shares = share_scales(exponents_v, unit, CAUSAL or WINDOW > 0)
        mixed *= (shrink * find_ratio(before, unit))[:, None]
        mixed += tl.dot((weights * shares[None, :]).to(value.dtype), value, input_precision=PRECISION)
    else:
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), mixed, unit


@triton.jit
def add_newest(
    query, query_scale, best, total, mixed, unit, new_key, new_value, place, pages, keys, values, key_exponents,
    value_exponents, first_row, key_page, value_page, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, SIZE_V: tl.constexpr, WIDE_V: tl.constexpr, PAGE: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """As `add_keys`, for the one key at `place`, which is written into its page. A query has no bias towards itself."""
    each = tl.arange(0, WIDE)
    each_v = tl.arange(0, WIDE_V)
    inside, inside_v = each < SIZE, each_v < SIZE_V
    key = tl.load(new_key + each, mask=inside, other=0.0)
    value = tl.load(new_value + each_v, mask=inside_v, other=0.0)
    page = tl.load(pages + place // PAGE).to(tl.int64)
    wide_key, wide_value, ratio, scale = key.to(tl.float32), value.to(tl.float32), 1.0, SCALE
    if ROUNDED:  # the newest ones, too, are seen as they are kept
        key, exponent = round_row(wide_key)
        value, exponent_v = round_row(wide_value)
        row = page * (key_page // SIZE) + first_row + place % PAGE
        tl.store(key_exponents + row, exponent)
        tl.store(value_exponents + row, exponent_v)
        scale = find_scales(exponent) * (query_scale * SCALE)
        before = unit
        unit, shares = share_scales(exponent_v.to(tl.int32) + tl.zeros([1], tl.int32), unit, False)
        ratio = find_ratio(before, unit)
        wide_key, wide_value = widen_row(key), widen_row(value) * tl.sum(shares, 0)
    tl.store(keys + page * key_page + (place % PAGE) * SIZE + each, key, mask=inside)
    tl.store(values + page * value_page + (place % PAGE) * SIZE_V + each_v, value, mask=inside_v)
    score = tl.sum(query.to(tl.float32) * wide_key[None, :], 1) * scale
    if SOFTCAP > 0:
        score = _cap(score, SOFTCAP)
    higher = tl.maximum(best, score)
    shrink, weight = tl.exp2(best - higher), tl.exp2(score - higher)
    mixed = mixed * (shrink * ratio)[:, None] + weight[:, None] * wide_value[None, :]
    return higher, total * shrink + weight, mixed, unit
