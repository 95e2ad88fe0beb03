"""Attention over pages on a GPU, in Triton: the same function as `attention.attend_in_torch`.

A decoding sequence is memory: its keys and values are read once, by one program a key head and split, which serves all
heads of the query that share them. A prefill chunk is arithmetic: one program a block of tokens and head. Scores and
sums are float32; products take the model's own type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from batchgen.engines.paged.layout import QUERY_BLOCK, AttentionShape, Layout
from batchgen.engines.paged.pages import PAGE_SIZE

_KEYS = 64  # tokens whose keys a program looks at at once
_DECODE = {"num_warps": 2, "num_stages": 2}  # the best of 19 that were tried; benchmarks/README.md
_LOG2_E = 1.4426950408889634  # the hardware computes exp2, so scores are in units of its exponent


class _Arguments(NamedTuple):
    """What the kernels of one call have in common, in the order in which they take it."""

    new: tuple[Any, ...]  # keys and values of the step's tokens, and their strides by token and head
    cache: tuple[Any, ...]  # the cache, and which of its pages belong to which tokens; ALiBi's slopes
    strides: tuple[int, ...]  # of the query by token and head; of the cache by half and page; of the block table by row
    constants: dict[str, Any]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: Layout,
    shape: AttentionShape,
) -> torch.Tensor:
    """As `attention.attend_in_torch`, for heads of up to 256 numbers."""
    _, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    out = torch.empty((1, tokens, heads, size), dtype=query.dtype, device=query.device)
    constants: dict[str, Any] = {
        "SCALE": shape.scale * _LOG2_E,
        "GROUP": heads // key_heads,
        "SIZE": size,
        "WIDE": _round_up(size),
        "PAGE": PAGE_SIZE,
        "KEYS": _KEYS,
        "WINDOW": shape.window,
        "ALIBI": shape.slopes is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    new = (key, value, key.stride(2), key.stride(1), value.stride(2), value.stride(1))
    common = (cache, layout.block_table, layout.slots, layout.positions, shape.slopes)
    assert layout.decoding_count is not None
    strides = (query.stride(2), query.stride(1), cache.stride(0), cache.stride(1), layout.block_table.stride(0))
    if layout.decoding:
        _launch_decode(query, out, layout, _Arguments(new, common, strides, constants))
    if layout.query_blocks is not None:
        _write[(tokens, key_heads)](
            *new, *common[:4], *strides[2:], layout.decoding_count, SIZE=size, WIDE=_round_up(size), PAGE=PAGE_SIZE,
            num_warps=1,
        )  # fmt: skip
        _prefill[(len(layout.query_blocks), heads)](
            query, out, layout.query_blocks, *common, *strides, heads * size, QUERIES=QUERY_BLOCK, num_warps=4,
            **constants,
        )  # fmt: skip
    return out


def _launch_decode(query: torch.Tensor, out: torch.Tensor, layout: Layout, arguments: _Arguments) -> None:
    """Attention of the tokens that decode, in one kernel, or in one for each part of their keys and one that joins."""
    new, common, strides, constants = arguments
    rows, splits, count = layout.decoding, layout.splits, layout.decoding_count
    _, _, heads, size = out.shape
    grid = (rows, heads // constants["GROUP"], splits)
    options = {**_DECODE, **constants, "ROWS": _round_up(constants["GROUP"])}
    if splits == 1:
        _decode[grid](query, out, out, count, *new, *common, *strides, heads * size, 0, SPLITS=1, **options)
        return
    partial = torch.empty((rows, heads, splits, size), dtype=torch.float32, device=out.device)
    sums = torch.empty((rows, heads, splits), dtype=torch.float32, device=out.device)
    widths = heads * splits * size, heads * splits
    _decode[grid](query, partial, sums, count, *new, *common, *strides, *widths, SPLITS=splits, **options)
    _join[(rows, heads)](partial, sums, out, heads * size, SPLITS=splits, SIZE=size, WIDE=_round_up(size), num_warps=1)


def _round_up(size: int) -> int:
    """The width of a range that holds `size`: ranges of Triton are powers of two, and its products take 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def _write(
    key, value, key_token, key_head, value_token, value_head, cache, table, slots, positions, half, page_size, columns,
    count, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A token's key and value of one head into its page, for the tokens behind those that decode."""
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    if (position >= 0) & (token >= tl.load(count)):
        page = tl.load(table + tl.load(slots + token) * columns + position // PAGE).to(tl.int64)
        each = tl.arange(0, WIDE)
        inside = each < SIZE
        to = cache + page * page_size + (head * PAGE + position % PAGE) * SIZE + each
        tl.store(to, tl.load(key + token * key_token + head * key_head + each, mask=inside), mask=inside)
        tl.store(to + half, tl.load(value + token * value_token + head * value_head + each, mask=inside), mask=inside)


@triton.jit
def _step(
    query, best, total, mixed, begin, end, first_seen, places, slope, pages, keys, page_size, half,
    SCALE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, ALIBI: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from `begin` on: the running maximum, sum and mix of values of each query."""
    others = begin + tl.arange(0, KEYS)
    there = (others < end) & (others >= first_seen)
    page = tl.load(pages + others // PAGE, mask=there, other=0).to(tl.int64)
    each = tl.arange(0, WIDE)
    at = keys + page[:, None] * page_size + (others % PAGE)[:, None] * SIZE + each[None, :]
    inside = there[:, None] if SIZE == WIDE else there[:, None] & (each < SIZE)[None, :]
    key = tl.load(at, mask=inside, other=0.0)
    value = tl.load(at + half, mask=inside, other=0.0)  # under way while the scores are worked out
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
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
        finite = (value - value) == 0.0
        value = tl.where(finite, value, 0.0).to(value.dtype)
        broken = tl.max(tl.where(finite, 0, 1), 1)
        mixed = tl.where(tl.max(tl.where(seen, broken[None, :], 0), 1)[:, None] > 0, float("nan"), mixed)
    higher = tl.maximum(best, tl.max(scores, 1))
    # While a query has seen no key at all, its maximum is -inf, and -inf - -inf is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(best - base)
    weights = tl.exp2(scores - base[:, None])
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def _newest(
    query, best, total, mixed, new_key, new_value, place, pages, keys, page_size, half,
    SCALE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """As `_step`, for the one key at `place`, which is written into its page. A query has no bias towards itself."""
    each = tl.arange(0, WIDE)
    inside = each < SIZE
    key, value = tl.load(new_key + each, mask=inside, other=0.0), tl.load(new_value + each, mask=inside, other=0.0)
    to = keys + tl.load(pages + place // PAGE).to(tl.int64) * page_size + (place % PAGE) * SIZE + each
    tl.store(to, key, mask=inside)
    tl.store(to + half, value, mask=inside)
    score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
    higher = tl.maximum(best, score)
    shrink, weight = tl.exp2(best - higher), tl.exp2(score - higher)
    mixed = mixed * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    return higher, total * shrink + weight, mixed


@triton.jit
def _decode(
    queries, out, sums, count, new_keys, new_values, key_token, key_head_size, value_token, value_head_size,
    cache, table, slots, positions, slopes, query_token, query_head, half, page_size, columns, out_token, sums_token,
    SCALE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The query heads of one key head, of one decoding sequence, over one of `SPLITS` equal parts of its keys.

    The newest key and value come from the model, and go into their page here.
    """
    token, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if token >= tl.load(count):
        return
    place = tl.load(positions + token)
    first = tl.maximum(place + 1 - WINDOW, 0) if WINDOW else 0
    share = tl.cdiv(tl.cdiv(place + 1 - first, SPLITS), KEYS) * KEYS
    begin = first + split * share
    end = tl.minimum(begin + share, place)
    rows = tl.arange(0, ROWS)
    each = tl.arange(0, WIDE)
    inside = each < SIZE
    heads = key_head * GROUP + rows
    valid = rows < GROUP
    valid_inside = valid[:, None] & inside[None, :]
    query = tl.load(
        queries + token * query_token + heads[:, None] * query_head + each[None, :], mask=valid_inside, other=0.0
    )
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + heads, mask=valid, other=0.0) * 1.4426950408889634
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDE], tl.float32)
    places = tl.zeros([ROWS], tl.int32) + place
    pages = table + tl.load(slots + token) * columns
    keys = cache + key_head * PAGE * SIZE
    for start in range(begin, end, KEYS):
        best, total, mixed = _step(
            query, best, total, mixed, start, end, first, places, slope, pages, keys, page_size, half,
            SCALE, SIZE, WIDE, PAGE, KEYS, 0, ALIBI, False, PRECISION,
        )  # fmt: skip
    if (begin <= place) & (place < begin + share):
        best, total, mixed = _newest(
            query, best, total, mixed, new_keys + token * key_token + key_head * key_head_size,
            new_values + token * value_token + key_head * value_head_size, place, pages, keys, page_size, half,
            SCALE, SIZE, WIDE, PAGE,
        )  # fmt: skip
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        to = out + token * out_token + heads[:, None] * SIZE + each[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=valid_inside)
    else:
        to = out + token * out_token + (heads[:, None] * SPLITS + split) * SIZE + each[None, :]
        tl.store(to, result, mask=valid_inside)
        weight = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(sums + token * sums_token + heads * SPLITS + split, weight, mask=valid)


@triton.jit
def _join(parts, sums, out, out_token, SPLITS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The parts of a head, each as much as its sum of exponentials says."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = token * tl.num_programs(1) + head
    splits = tl.arange(0, SPLITS)
    each = tl.arange(0, WIDE)
    inside = each < SIZE
    weight = tl.load(sums + row * SPLITS + splits)
    largest = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(largest == float("-inf"), 0.0, largest))
    part = tl.load(parts + (row * SPLITS + splits)[:, None] * SIZE + each[None, :], mask=inside[None, :])
    total = tl.sum(weight, 0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + token * out_token + head * SIZE + each, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _prefill(
    queries, out, blocks, cache, table, slots, positions, slopes, query_token, query_head, half, page_size, columns,
    out_token,
    SCALE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One head of a block of consecutive tokens of a sequence, over all keys up to theirs."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, count = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    if count == 0:
        return
    rows = tl.arange(0, QUERIES)
    each = tl.arange(0, WIDE)
    valid = (rows < count)[:, None] & (each < SIZE)[None, :]
    query = tl.load(
        queries + (token + rows)[:, None] * query_token + head * query_head + each[None, :], mask=valid,
        other=0.0,
    )  # fmt: skip
    place = tl.load(positions + token)
    places = place + rows
    end = place + count
    first = tl.maximum(place + 1 - WINDOW, 0) // KEYS * KEYS if WINDOW else 0
    slope = tl.zeros([QUERIES], tl.float32)
    if ALIBI:
        slope += tl.load(slopes + head) * 1.4426950408889634
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDE], tl.float32)
    pages = table + tl.load(slots + token) * columns
    keys = cache + (head // GROUP) * PAGE * SIZE
    middle = place // KEYS * KEYS  # from `begin` to here all queries see all keys, and need no mask, which takes time
    begin = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS) * KEYS, middle) if WINDOW else first
    if WINDOW:
        for start in range(first, begin, KEYS):
            best, total, mixed = _step(
                query, best, total, mixed, start, begin, first, places, slope, pages, keys, page_size, half,
                SCALE, SIZE, WIDE, PAGE, KEYS, WINDOW, ALIBI, False, PRECISION,
            )  # fmt: skip
    for start in range(begin, middle, KEYS):
        best, total, mixed = _step(
            query, best, total, mixed, start, middle, first, places, slope, pages, keys, page_size, half,
            SCALE, SIZE, WIDE, PAGE, KEYS, 0, ALIBI, False, PRECISION,
        )  # fmt: skip
    for start in range(middle, end, KEYS):
        best, total, mixed = _step(
            query, best, total, mixed, start, end, first, places, slope, pages, keys, page_size, half,
            SCALE, SIZE, WIDE, PAGE, KEYS, WINDOW, ALIBI, True, PRECISION,
        )  # fmt: skip
    to = out + (token + rows)[:, None] * out_token + head * SIZE + each[None, :]
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(to, result.to(out.dtype.element_ty), mask=valid)
