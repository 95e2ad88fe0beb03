"""Attention over pages: keys and values go into their pages, and each token attends to those of its sequence.

`attend` takes the place of a model's own attention (`models` puts it there). It is an operator that the compiler does
not look into: when it runs, it finds the `Layout` of the step, and computes by the Triton `kernels` on a GPU, and by
`attend_in_torch` elsewhere.

Without a layout, attention is plain and causal over the given tokens alone: what a model is checked against.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from batchgen.engine import EngineError
from batchgen.engines.paged.layout import (
    AttentionShape,
    CacheHalf,
    LayerCache,
    Layout,
    are_rounded_as_cache,
    get_current_layout,
    note_window,
)
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.rounding import Rounded, round_numbers, widen_numbers

LARGEST_HEAD = 256
"""The largest size of keys, and of values, that the kernels cover; attention in torch has no limit."""

LARGEST_FLOAT32_HEAD = 128
"""The same in float32: tiles of larger heads do not fit the shared memory of an H100, and in parts (as TF32, of which
Triton adds three products) they were seen to read memory that is not theirs."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Attention of all tokens of the step, whose keys and values go into the cache.

    Args:
        query: [1, heads, tokens, key size].
        key: [1, key heads, tokens, key size]; each key head serves `heads / key heads` heads of the query.
        value: [1, key heads, tokens, value size].
        layer: the layer's number, [1], on the CPU.

    Returns:
        [1, tokens, heads, value size].
    """
    output: torch.Tensor = torch.ops.batchgen.paged_attention(query, key, value, layer, *shape)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, *fields: Any
) -> torch.Tensor:
    """The operator's implementation; `fields` are those of an `AttentionShape`."""
    shape, layout, number = AttentionShape(*fields), get_current_layout(), int(layer)
    if layout is None:
        note_window(number, shape.window)
        if are_rounded_as_cache():
            key, value = (widen_numbers(round_numbers(numbers), numbers.dtype) for numbers in (key, value))
        return _attend_within(query, key, value, shape)
    _check_window(layout, number, shape)
    layout, cache = layout.of_layer(number), layout.caches[number]
    if query.device.type == "cuda":
        from batchgen.engines.paged import kernels  # Triton comes with a torch for GPUs alone

        return kernels.attend(query, key, value, cache, layout, shape)
    return attend_in_torch(query, key, value, cache, layout, shape)


def _check_window(layout: Layout, layer: int, shape: AttentionShape) -> None:
    """Raises `EngineError` if pages are given back that this attention sees: its text would be wrong without a word."""
    groups = layout.groups
    if groups.windowed and groups.has_window(groups.places[layer].group) and not 0 < shape.window <= groups.window:
        raise EngineError(
            f"layer {layer} of this model looks back further than the {groups.window} tokens that it did at load; "
            "use --engine accelerate"
        )


def _make_output(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *__: Any) -> torch.Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


_library = torch.library.Library("batchgen", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor layer, float scale, int window, Tensor? slopes,"
    " float softcap, Tensor? sinks) -> Tensor"
)
_library.impl("paged_attention", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::paged_attention", _make_output, lib=_library)


def attend_in_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    layout: Layout,
    shape: AttentionShape,
) -> torch.Tensor:
    """As `attend`, in plain torch on any device.

    Args:
        query, key, value: as in `attend`.
        cache: this layer's; the step's tokens are written.
    """
    real = slice(None) if layout.has_no_padding else layout.positions >= 0
    for half, values in zip(cache.halves, (key, value), strict=True):
        layout.write_rows.write(half, values[0][:, real])
    if cache.is_rounded:  # a step's own tokens, too, are seen as they are kept
        key, value = (widen_numbers(round_numbers(values), values.dtype) for values in (key, value))
    out = _make_output(query, key, value).zero_()
    if layout.decoding:
        decoded = _decode(query[0, :, : layout.decoding], cache, layout, shape)
        if not layout.has_no_padding:
            decoded = decoded.masked_fill((layout.positions[: layout.decoding] < 0)[:, None, None], 0)
        out[0, : layout.decoding] = decoded
    window = shape.window
    is_plain = shape.slopes is None and _is_known_to_torch(shape) and bool(layout.chunks)
    is_plain = is_plain and bool(key.isfinite().all() & value.isfinite().all())
    for chunk in layout.chunks:
        tokens = slice(chunk.first, chunk.first + chunk.count)
        queries = query[:, :, tokens]
        if is_plain and chunk.count == chunk.length and not 0 < window < chunk.length:  # it sees nothing but this step
            grouped = query.shape[1] != key.shape[1]
            attended = F.scaled_dot_product_attention(
                queries, key[:, :, tokens], value[:, :, tokens], is_causal=True, scale=shape.scale, enable_gqa=grouped
            )
        else:
            table = layout.block_table[chunk.slot : chunk.slot + 1]
            keys, values = (_read(half, table, chunk.length, query.dtype) for half in cache.halves)
            begin = torch.tensor([chunk.length - chunk.count], device=query.device)
            attended = _attend_masked(queries, keys, values, begin, shape)
        out[0, tokens] = attended[0].transpose(0, 1)
    return out


def _decode(query: torch.Tensor, cache: LayerCache, layout: Layout, shape: AttentionShape) -> torch.Tensor:
    """Attention of one token a sequence, [heads, sequences, key size] to [sequences, heads, value size].

    The heads that share keys are as many tokens of one head, which see the same.
    """
    rows = layout.read_rows
    key, value = (rows.read(half, shape.window, query.dtype) for half in cache.halves)
    grouped = (key.shape[0], key.shape[1], -1, key.shape[-1])  # [sequences, key heads, heads of each, key size]
    bias = rows.get_bias(shape.window, shape.slopes, query.dtype)
    if not _is_known_to_torch(shape):
        return _attend_by_scores(query.transpose(0, 1)[:, :, None], key, value, bias, shape)[:, :, 0]
    if shape.slopes is not None:
        bias = bias.view(*grouped[:2], -1, key.shape[2])
    queries = query.transpose(0, 1).reshape(grouped)
    return F.scaled_dot_product_attention(queries, key, value, bias, scale=shape.scale).flatten(1, 2)


def _read(half: CacheHalf, block_table: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of the sequences of these rows of the block table, [sequences, heads, length, size]."""
    pages = block_table[:, : -(-length // PAGE_SIZE)].long()
    if isinstance(half, Rounded):
        numbers, exponents = (part[pages] for part in half)
        read = widen_numbers(Rounded(numbers, exponents), dtype)
    else:
        read = half[pages]
    return read.transpose(1, 2).flatten(2, 3)[..., :length, :]


def _attend_masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begin: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Causal attention of [sequences, heads, tokens, key size], whose first tokens are at positions `begin`.

    What a token does not see has no part in its result, be it NaN: behind the end of a short sequence lie pages of
    others, and 0 * NaN is NaN. A token that sees a key or value which is not finite gets NaN. Changes key and value.
    """
    positions = begin[:, None] + torch.arange(query.shape[2], device=query.device)  # [sequences, tokens]
    key_positions = torch.arange(key.shape[2], device=query.device)
    seen = key_positions <= positions[..., None]  # [sequences, tokens, keys]
    if shape.window:
        seen &= key_positions > positions[..., None] - shape.window
    sequences, hidden = (~seen.any(1)).nonzero(as_tuple=True)
    for tensor in (key, value):
        tensor[sequences, :, hidden] = 0
    broken = _replace_not_finite(key, value) if query.shape[2] > 1 else None
    mask = seen[:, None]
    if shape.slopes is not None:
        # Relative to the token itself: softmax does not see the difference, and the numbers stay small.
        bias = shape.slopes[:, None, None] * (key_positions - positions[:, None, :, None])
        mask = bias.masked_fill(~mask, -torch.inf).to(query.dtype)
    if _is_known_to_torch(shape):
        grouped = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=shape.scale, enable_gqa=grouped)
    else:
        attended = _attend_by_scores(query, key, value, mask, shape)
    if broken is None:
        return attended
    return attended.masked_fill((seen & broken[:, None]).any(-1)[:, None, :, None], torch.nan)


def _is_known_to_torch(shape: AttentionShape) -> bool:
    """Whether `F.scaled_dot_product_attention` has all that this attention needs."""
    return not shape.softcap and shape.sinks is None


def _attend_by_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """As `F.scaled_dot_product_attention`, with the cap on scores and the sinks of `shape`; in float32 or wider.

    Args:
        query: [sequences, heads, tokens, key size].
        key, value: [sequences, key heads, length, size].
        mask: [sequences, heads or 1, tokens, length]; a bool: whether the token sees that key; else added to the score.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    sequences, heads, tokens, _ = query.shape
    key_heads, length = key.shape[1:3]
    # The heads that share keys are as many tokens of one head.
    together = query.to(wide).reshape(sequences, key_heads, -1, query.shape[3])
    scores = (together @ key.to(wide).transpose(2, 3) * shape.scale).view(sequences, heads, tokens, length)
    if shape.softcap:
        capped = shape.softcap * torch.tanh(scores / shape.softcap)
        scores = capped.masked_fill(scores.isinf(), torch.nan)  # a broken key, which the cap would hide
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    total = scores.logsumexp(-1, keepdim=True)
    if shape.sinks is not None:
        total = torch.logaddexp(total, shape.sinks.to(wide)[:, None, None])
    weights = (scores - total).exp().view(sequences, key_heads, -1, length)
    return (weights @ value.to(wide)).view(sequences, heads, tokens, -1).to(query.dtype)


def _replace_not_finite(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """Makes keys and values 0 where one of them is not finite.

    Returns:
        Whether that is so, [sequences, keys]; None: all are finite.
    """
    broken = ~(torch.isfinite(key).all(-1).all(1) & torch.isfinite(value).all(-1).all(1))
    if not broken.any():
        return None
    for tensor in (key, value):
        tensor.masked_fill_(broken[:, None, :, None], 0)
    return broken


def _attend_within(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """Plain causal attention of the given tokens over themselves."""
    begin = torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
    return _attend_masked(query, key.clone(), value.clone(), begin, shape).transpose(1, 2).contiguous()
