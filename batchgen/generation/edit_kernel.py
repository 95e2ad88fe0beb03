"""The edits of logits on a GPU, in Triton: what `edits` computes, in one pass over them in place of some ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchgen.generation.edits import EditTensors

_BLOCK = 4096  # tokens that a program looks at together
_WARPS = 8


def edit_logits(logits: torch.Tensor, edits: EditTensors) -> None:
    """Adds the bias and subtracts the penalties, in place; see `edits.edit_logits`.

    Args:
        logits: float32 [rows, vocabulary], contiguous.
        edits: of the same rows.
    """
    rows, vocabulary = logits.shape
    seen, bias = edits.seen is not None, edits.bias is not None
    if not seen and not bias:
        return
    _edit[(rows, triton.cdiv(vocabulary, _BLOCK))](
        logits, edits.seen if seen else logits, edits.seen_rows, edits.bias if bias else logits, edits.bias_rows,
        edits.repetition, edits.frequency, edits.presence, vocabulary,
        SEEN=seen, BIAS=bias, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Makes the tokens impossible whose bit is not set, in place; see `edits.apply_bitmask`.

    Args:
        logits: [rows, vocabulary], floating, contiguous.
        bitmask: int32 [rows, words], contiguous.
    """
    rows, vocabulary = logits.shape
    grid = (rows, triton.cdiv(vocabulary, _BLOCK))
    _mask[grid](logits, bitmask, vocabulary, bitmask.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


@triton.jit
def _edit(
    logits, seen, seen_rows, bias, bias_rows, repetitions, frequencies, presences, vocabulary,
    SEEN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    values = tl.load(logits + row * vocabulary + token, mask=inside, other=0.0)
    if BIAS:
        values += tl.load(bias + tl.load(bias_rows + row) * vocabulary + token, mask=inside, other=0.0)
    if SEEN:
        count = tl.load(seen + tl.load(seen_rows + row) * vocabulary + token, mask=inside, other=0).to(tl.int32)
        repetition = tl.load(repetitions + row)
        frequency = tl.load(frequencies + row)
        presence = tl.load(presences + row)
        repeated = tl.where(values > 0, tl.div_rn(values, repetition + values * 0), values * repetition)
        values = tl.where(count > 0, repeated, values)
        values -= frequency * (count >> 1).to(tl.float32)
        values -= tl.where(count > 1, presence, 0.0)
    tl.store(logits + row * vocabulary + token, values, mask=inside)


@triton.jit
def _mask(logits, bitmask, vocabulary, words, BLOCK: tl.constexpr):
    """One chunk of one row; only what becomes impossible is written."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = token // 32
    bits = tl.load(bitmask + row * words + word, mask=(token < vocabulary) & (word < words), other=0)
    is_forbidden = ((bits >> (token % 32)) & 1) == 0
    tl.store(
        logits + row * vocabulary + token,
        tl.full([BLOCK], float("-inf"), logits.dtype.element_ty),
        mask=(token < vocabulary) & is_forbidden,
    )
