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

from batchgen.engines.paged import kernel_settings
from batchgen.engines.paged.layout import QUERY_BLOCK, AttentionShape, LayerCache, Layout
from batchgen.engines.paged.online_softmax import LOG2_E, add_keys, add_newest
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding_kernels import find_unit, round_row, scale_queries


class _Arguments(NamedTuple):
    """What the kernels of one call have in common, in the order in which they take it."""

    new: tuple[Any, ...]  # keys and values of the step's tokens, and their strides by token and head
    cache: tuple[Any, ...]  # cached keys and values, and which of their pages belong to which tokens; slopes; sinks
    strides: tuple[int, ...]  # of the query by token and head; of cached keys and values by page; of the table by row
    constants: dict[str, Any]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    layout: Layout,
    shape: AttentionShape,
) -> torch.Tensor:
    """As `attention.attend_in_torch`, for keys and values of up to `attention.LARGEST_HEAD` numbers."""
    _, heads, tokens, size = query.shape
    key_heads, value_size = value.shape[1], value.shape[3]
    out = torch.empty((1, tokens, heads, value_size), dtype=query.dtype, device=query.device)
    sizes = {"SIZE": size, "WIDE": _round_up(size), "SIZE_V": value_size, "WIDE_V": _round_up(value_size)}
    sizes |= {"PAGE": PAGE_SIZE, "ROUNDED": cache.is_rounded}
    constants: dict[str, Any] = {
        **sizes,
        "SCALE": shape.scale * LOG2_E.value,
        "SOFTCAP": float(shape.softcap),
        "GROUP": heads // key_heads,
        "WINDOW": shape.window,
        "ALIBI": shape.slopes is not None,
        "SINKS": shape.sinks is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    new = (key, value, key.stride(2), key.stride(1), value.stride(2), value.stride(1))
    kept = [half.view(torch.uint8) if cache.is_rounded else half for half in cache[:2]]
    common = (*kept, *cache[2:], layout.block_table, layout.slots, layout.positions, shape.slopes, shape.sinks)
    assert layout.decoding_count is not None
    pages = (cache.keys.stride(0), cache.values.stride(0), layout.block_table.stride(0))
    strides = (query.stride(2), query.stride(1), *pages)
    if layout.decoding:
        _launch_decode(query, out, layout, _Arguments(new, common, strides, constants))
    if layout.query_blocks is not None:
        _write[(tokens, key_heads)](*new, *common[:7], *pages, layout.decoding_count, **sizes, num_warps=1)
        _prefill[(len(layout.query_blocks), heads)](
            query, out, layout.query_blocks, *common, *strides, heads * value_size, QUERIES=QUERY_BLOCK, **constants,
            **_choose("prefill", constants),
        )  # fmt: skip
    return out


def _launch_decode(query: torch.Tensor, out: torch.Tensor, layout: Layout, arguments: _Arguments) -> None:
    """Attention of the tokens that decode, in one kernel, or in one for each part of their keys and one that joins."""
    new, common, strides, constants = arguments
    rows, splits, count = layout.decoding, layout.splits, layout.decoding_count
    _, _, heads, size = out.shape
    grid = (rows, heads // constants["GROUP"], splits)
    options = {**constants, **_choose("decode", constants), "ROWS": _round_up(constants["GROUP"])}
    if splits == 1:
        _decode[grid](query, out, out, count, *new, *common, *strides, heads * size, 0, SPLITS=1, **options)
        return
    partial = torch.empty((rows, heads, splits, size), dtype=torch.float32, device=out.device)
    sums = torch.empty((rows, heads, splits), dtype=torch.float32, device=out.device)
    widths = heads * splits * size, heads * splits
    _decode[grid](query, partial, sums, count, *new, *common, *strides, *widths, SPLITS=splits, **options)
    _join[(rows, heads)](partial, sums, out, heads * size, SPLITS=splits, SIZE=size, WIDE=_round_up(size), num_warps=1)


def _choose(kernel: str, constants: dict[str, Any]) -> dict[str, int]:
    """The settings for the sizes of `constants`, as a launch takes them."""
    settings = kernel_settings.choose(kernel, constants["ROUNDED"])
    largest = max(constants["SIZE"], constants["SIZE_V"])
    chosen = settings[min(size for size in settings if size >= largest)]
    return {"KEYS": chosen.keys, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def _round_up(size: int) -> int:
    """The width of a range that holds `size`: ranges of Triton are powers of two, and its products take 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def _write(
    key, value, key_token, key_head, value_token, value_head, cached_keys, cached_values, key_exponents,
    value_exponents, table, slots, positions, key_page, value_page, columns, count, SIZE: tl.constexpr,
    WIDE: tl.constexpr, SIZE_V: tl.constexpr, WIDE_V: tl.constexpr, PAGE: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """A token's key and value of one head into its page, for the tokens behind those that decode."""
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    if (position >= 0) & (token >= tl.load(count)):
        page = tl.load(table + tl.load(slots + token) * columns + position // PAGE).to(tl.int64)
        row = head * PAGE + position % PAGE
        each = tl.arange(0, WIDE)
        inside = each < SIZE
        new = tl.load(key + token * key_token + head * key_head + each, mask=inside, other=0.0)
        if ROUNDED:
            new, exponent = round_row(new.to(tl.float32))
            tl.store(key_exponents + page * (key_page // SIZE) + row, exponent)
        tl.store(cached_keys + page * key_page + row * SIZE + each, new, mask=inside)
        each = tl.arange(0, WIDE_V)
        inside = each < SIZE_V
        new = tl.load(value + token * value_token + head * value_head + each, mask=inside, other=0.0)
        if ROUNDED:
            new, exponent = round_row(new.to(tl.float32))
            tl.store(value_exponents + page * (key_page // SIZE) + row, exponent)
        tl.store(cached_values + page * value_page + row * SIZE_V + each, new, mask=inside)


@triton.jit
def _decode(
    queries, out, sums, count, new_keys, new_values, key_token, key_head_size, value_token, value_head_size,
    cached_keys, cached_values, key_exponents, value_exponents, table, slots, positions, slopes, sinks, query_token,
    query_head, key_page, value_page, columns, out_token, sums_token, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, SIZE_V: tl.constexpr, WIDE_V: tl.constexpr,
    PAGE: tl.constexpr, ROUNDED: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
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
    rows, each = tl.arange(0, ROWS), tl.arange(0, WIDE)
    heads, valid = key_head * GROUP + rows, rows < GROUP
    query = tl.load(
        queries + token * query_token + heads[:, None] * query_head + each[None, :],
        mask=valid[:, None] & (each < SIZE)[None, :], other=0.0,
    )  # fmt: skip
    query, query_scale, unit = scale_queries(query, ROUNDED)
    slope = tl.load(slopes + heads, mask=valid, other=0.0) * LOG2_E if ALIBI else tl.zeros([ROWS], tl.float32)
    best, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SINKS:  # a key without a value, which the first one of the splits counts
        best = tl.where(split == 0, tl.load(sinks + heads, mask=valid, other=0.0).to(tl.float32) * LOG2_E, best)
        total = tl.where(split == 0, 1.0, total)
    mixed = tl.zeros([ROWS, WIDE_V], tl.float32)
    places = tl.zeros([ROWS], tl.int32) + place
    pages = table + tl.load(slots + token) * columns
    row = key_head * PAGE
    keys, values = cached_keys + row * SIZE, cached_values + row * SIZE_V
    for start in range(begin, end, KEYS):
        best, total, mixed, unit = add_keys(
            query, query_scale, best, total, mixed, unit, start, end, first, places, slope, pages, keys, values,
            key_exponents, value_exponents, row, key_page, value_page, SCALE, SOFTCAP, SIZE, WIDE, SIZE_V, WIDE_V,
            PAGE, ROUNDED, KEYS, 0, ALIBI, False, PRECISION,
        )  # fmt: skip
    if (begin <= place) & (place < begin + share):
        best, total, mixed, unit = add_newest(
            query, query_scale, best, total, mixed, unit, new_keys + token * key_token + key_head * key_head_size,
            new_values + token * value_token + key_head * value_head_size, place, pages, keys, values, key_exponents,
            value_exponents, row, key_page, value_page, SCALE, SOFTCAP, SIZE, WIDE, SIZE_V, WIDE_V, PAGE, ROUNDED,
        )  # fmt: skip
    result = mixed * find_unit(unit, ROUNDED) / tl.where(total > 0, total, 1.0)[:, None]
    each_v = tl.arange(0, WIDE_V)
    valid_inside = valid[:, None] & (each_v < SIZE_V)[None, :]
    if SPLITS == 1:
        to = out + token * out_token + heads[:, None] * SIZE_V + each_v[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=valid_inside)
    else:
        to = out + token * out_token + (heads[:, None] * SPLITS + split) * SIZE_V + each_v[None, :]
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
    queries, out, blocks, cached_keys, cached_values, key_exponents, value_exponents, table, slots, positions, slopes,
    sinks, query_token, query_head, key_page, value_page, columns, out_token, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, SIZE_V: tl.constexpr,
    WIDE_V: tl.constexpr, PAGE: tl.constexpr, ROUNDED: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One head of a block of consecutive tokens of a sequence, over all keys up to theirs."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, count = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    if count == 0:
        return
    rows = tl.arange(0, QUERIES)
    each = tl.arange(0, WIDE)
    query = tl.load(
        queries + (token + rows)[:, None] * query_token + head * query_head + each[None, :],
        mask=(rows < count)[:, None] & (each < SIZE)[None, :], other=0.0,
    )  # fmt: skip
    place = tl.load(positions + token)
    places = place + rows
    end = place + count
    first = tl.maximum(place + 1 - WINDOW, 0) // KEYS * KEYS if WINDOW else 0
    query, query_scale, unit = scale_queries(query, ROUNDED)
    slope = tl.zeros([QUERIES], tl.float32)
    if ALIBI:
        slope += tl.load(slopes + head) * LOG2_E
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if SINKS:  # a key without a value
        best = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    mixed = tl.zeros([QUERIES, WIDE_V], tl.float32)
    pages = table + tl.load(slots + token) * columns
    row = (head // GROUP) * PAGE
    keys, values = cached_keys + row * SIZE, cached_values + row * SIZE_V
    middle = place // KEYS * KEYS  # from `begin` to here all queries see all keys, and need no mask, which takes time
    begin = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS) * KEYS, middle) if WINDOW else first
    if WINDOW:
        for start in range(first, begin, KEYS):
            best, total, mixed, unit = add_keys(
                query, query_scale, best, total, mixed, unit, start, begin, first, places, slope, pages, keys, values,
                key_exponents, value_exponents, row, key_page, value_page, SCALE, SOFTCAP, SIZE, WIDE, SIZE_V, WIDE_V,
                PAGE, ROUNDED, KEYS, WINDOW, ALIBI, False, PRECISION,
            )  # fmt: skip
    for start in range(begin, middle, KEYS):
        best, total, mixed, unit = add_keys(
            query, query_scale, best, total, mixed, unit, start, middle, first, places, slope, pages, keys, values,
            key_exponents, value_exponents, row, key_page, value_page, SCALE, SOFTCAP, SIZE, WIDE, SIZE_V, WIDE_V,
            PAGE, ROUNDED, KEYS, 0, ALIBI, False, PRECISION,
        )  # fmt: skip
    for start in range(middle, end, KEYS):
        best, total, mixed, unit = add_keys(
            query, query_scale, best, total, mixed, unit, start, end, first, places, slope, pages, keys, values,
            key_exponents, value_exponents, row, key_page, value_page, SCALE, SOFTCAP, SIZE, WIDE, SIZE_V, WIDE_V,
            PAGE, ROUNDED, KEYS, WINDOW, ALIBI, True, PRECISION,
        )  # fmt: skip
    each_v = tl.arange(0, WIDE_V)
    to = out + (token + rows)[:, None] * out_token + head * SIZE_V + each_v[None, :]
    result = mixed * find_unit(unit, ROUNDED) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(to, result.to(out.dtype.element_ty), mask=(rows < count)[:, None] & (each_v < SIZE_V)[None, :])
