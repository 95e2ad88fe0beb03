"""Sampling on a GPU, in Triton: what `sampling.sample` computes, without sorting or scanning whole vocabularies.

A program samples one row. It finds the nucleus by bisection: the floats of a row, taken as whole numbers of the same
order, are split at seven places at once, and the probability (for top-k, the number of tokens) above each of them is
summed up, until one float is left. So a row of 128,256 logits in 16 bits is read some eight times, mostly from the
cache of the GPU, where a sort in float64 moves it dozens of times.

Probabilities are float32; sums over a vocabulary are float64. Nothing depends on the rows beside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchgen.generation.sampling import SamplingTensors

_BLOCK, _WARPS = 4096, 16  # tokens that a program looks at together, by this many warps; benchmarks/README.md
_SMALLEST_TEMPERATURE = 1e-30  # float32 holds it, and it is greedy as it is


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    uniform: torch.Tensor,
    params: SamplingTensors,
) -> torch.Tensor:
    """Samples one token for some of the rows; see `sampling.sample_rows`.

    Args:
        logits: [all rows, vocabulary], float32, bfloat16 or float16; the logits of a row are adjacent in memory.
        rows: the sampled rows of `logits`, int64 [sampled rows].
        uniform: in [0, 1), float64 [sampled rows].
        params: of the sampled rows.

    Returns:
        Token ids, int64 [sampled rows].
    """
    vocabulary = logits.shape[-1]
    tokens = torch.empty_like(rows)
    unused = params.temperature  # a pointer that is never read
    chunks = triton.next_power_of_2(triton.cdiv(vocabulary, _BLOCK))
    _sample[(len(rows),)](
        logits, logits.stride(0), rows, uniform, params.temperature, _or(params.top_p, unused),
        _or(params.min_p, unused), params.top_k, tokens, vocabulary,
        TOP_P=params.top_p is not None, MIN_P=params.min_p is not None, BLOCK=_BLOCK, CHUNKS=chunks,
        SHIFT=16 if logits.dtype == torch.bfloat16 else 0, COLDEST=_SMALLEST_TEMPERATURE, num_warps=_WARPS,
    )  # fmt: skip
    return tokens


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor.contiguous()


@triton.jit
def _load(base, begin, vocabulary, BLOCK: tl.constexpr):
    """Logits of one chunk, float32; behind the vocabulary -inf."""
    token = begin + tl.arange(0, BLOCK)
    return tl.load(base + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(values, SHIFT: tl.constexpr):
    """Whole numbers in the order of the floats. A bfloat16 is told from others by its upper 16 bits."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _weigh(values, peak, temperature):
    """Probabilities, but for a factor: the likeliest token has 1."""
    return tl.exp((values - peak) / temperature)


@triton.jit
def _reaches(order, low, step, place: tl.constexpr, weight):
    """The weight of tokens of at least `low + place * step` in order; 0 for the others."""
    # No float has the largest number there is, so that a bound beyond it is reached by none.
    bound = tl.minimum(low + place * step, 0x7FFFFFFF).to(tl.int32)
    return tl.where(order >= bound, weight, 0.0)


@triton.jit
def _find_threshold(
    base, vocabulary, peak, temperature, least, floor, wanted, lowest, highest, counts,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest number in order at or above which tokens sum up to at least `wanted`, and the sum above it alone.

    What is summed up is 1 for each token if `counts`, else the weight of those of at least `floor` in order and `least`
    in weight. All tokens are from `lowest` to below `highest`, and together they sum up to `wanted` or more; if not,
    it is `lowest`.
    """
    low = lowest
    high = highest
    above = wanted * 0.0
    while high - low > 1:
        step = (high - low + 7) // 8
        sum1 = tl.zeros([BLOCK], tl.float32)
        sum2 = tl.zeros([BLOCK], tl.float32)
        sum3 = tl.zeros([BLOCK], tl.float32)
        sum4 = tl.zeros([BLOCK], tl.float32)
        sum5 = tl.zeros([BLOCK], tl.float32)
        sum6 = tl.zeros([BLOCK], tl.float32)
        sum7 = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            values = _load(base, begin, vocabulary, BLOCK)
            order = _order(values, SHIFT)
            weight = _weigh(values, peak, temperature)
            weight = tl.where(counts, 1.0, tl.where((order >= floor) & (weight >= least), weight, 0.0))
            sum1 += _reaches(order, low, step, 1, weight)
            sum2 += _reaches(order, low, step, 2, weight)
            sum3 += _reaches(order, low, step, 3, weight)
            sum4 += _reaches(order, low, step, 4, weight)
            sum5 += _reaches(order, low, step, 5, weight)
            sum6 += _reaches(order, low, step, 6, weight)
            sum7 += _reaches(order, low, step, 7, weight)
        # How many of the seven still reach what is wanted (sums fall as their bounds rise), and the next sum.
        reached = low * 0
        beyond = above
        sums = (sum7, sum6, sum5, sum4, sum3, sum2, sum1)
        for place in tl.static_range(7):
            total = tl.sum(sums[place].to(tl.float64))
            has_reached = total >= wanted
            beyond = tl.where(has_reached, beyond, total)
            reached += has_reached.to(tl.int64)
        bound = low + (reached + 1) * step
        is_inside = (reached < 7) & (bound < high)
        above = tl.where(is_inside, beyond, above)
        high = tl.where(is_inside, bound, high)
        low = low + reached * step
    return low, above


@triton.jit
def _find_floor(
    base, vocabulary, peak, temperature, least, top_k, top_p, lowest, highest, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """What a token must have in order to be drawn, by top-k and then by top-p, and how many of those that have exactly
    that, the ones with the smallest ids."""
    floor = lowest.to(tl.int32)  # in order: tokens below it are not drawn, those of -inf among them
    ties_kept = vocabulary.to(tl.float64)  # of the tokens exactly at the floor, those with the smallest ids
    # Once for top-k, then for top-p; one loop, so that the compiler makes the search only once.
    for search in range(2):
        counts = search == 0
        is_wanted = tl.where(counts, (top_k > 0) & (top_k < vocabulary), top_p < 1)
        if is_wanted:
            wanted = top_k.to(tl.float64)
            if search == 1:
                whole = tl.zeros([BLOCK], tl.float64)
                for begin in range(0, vocabulary, BLOCK):
                    values = _load(base, begin, vocabulary, BLOCK)
                    weight = _weigh(values, peak, temperature)
                    whole += tl.where((_order(values, SHIFT) >= floor) & (weight >= least), weight, 0.0)
                wanted = top_p * tl.sum(whole)
            # Fewer tokens than top-k may be there, if others are -inf: then the search ends with all of them.
            threshold, above = _find_threshold(
                base, vocabulary, peak, temperature, least, floor, wanted, floor.to(tl.int64), highest, counts,
                BLOCK, SHIFT,
            )  # fmt: skip
            floor = threshold.to(tl.int32)
            if search == 1:
                bits = floor << SHIFT
                bits = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT) << SHIFT
                weight_at = _weigh(bits.to(tl.float32, bitcast=True), peak, temperature).to(tl.float64)
                ties_kept = tl.maximum(tl.ceil((wanted - above) / tl.maximum(weight_at, 1e-300)), 1.0)
    return floor, ties_kept


@triton.jit
def _find_token(
    base, vocabulary, peak, temperature, least, floor, ties_kept, uniform,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The token at `uniform` of the cumulative distribution."""
    # The inverse of the cumulative distribution: first the chunk, then the token in it.
    chunk = tl.arange(0, CHUNKS)
    sums = tl.zeros([CHUNKS], tl.float64)
    ties_before = tl.zeros([CHUNKS], tl.float64)
    ties = ties_kept * 0
    for number in range(tl.cdiv(vocabulary, BLOCK)):
        values = _load(base, number * BLOCK, vocabulary, BLOCK)
        order = _order(values, SHIFT)
        weight = _weigh(values, peak, temperature)
        weight = tl.where(weight >= least, weight, 0.0).to(tl.float64)
        own = tl.sum(tl.where(order == floor, 1.0, 0.0)).to(tl.float64)
        kept = tl.minimum(tl.maximum(ties_kept - ties, 0.0), own)
        at_floor = tl.max(tl.where(order == floor, weight, 0.0))
        total = tl.sum(tl.where(order > floor, weight, 0.0)) + kept * at_floor
        sums = tl.where(chunk == number, total, sums)
        ties_before = tl.where(chunk == number, ties, ties_before)
        ties += own
    reached = tl.cumsum(sums, 0)
    target = uniform * tl.sum(sums)
    # The last chunk that holds anything, if rounding puts the target behind them all.
    last = tl.max(tl.where(sums > 0, chunk, 0))
    number = tl.minimum(tl.sum((reached <= target).to(tl.int32)), last)
    target -= tl.sum(tl.where(chunk == number, reached - sums, 0.0))
    ties = tl.sum(tl.where(chunk == number, ties_before, 0.0))

    values = _load(base, number * BLOCK, vocabulary, BLOCK)
    order = _order(values, SHIFT)
    weight = _weigh(values, peak, temperature)
    weight = tl.where((weight >= least) & (order >= floor), weight, 0.0).to(tl.float64)
    is_tie = (order == floor).to(tl.int32)
    is_kept = (order > floor) | ((is_tie > 0) & (ties + (tl.cumsum(is_tie, 0) - is_tie) < ties_kept))
    weight = tl.where(is_kept, weight, 0.0)
    offset = tl.arange(0, BLOCK)
    last = tl.max(tl.where(weight > 0, offset, 0))
    return number * BLOCK + tl.minimum(tl.sum((tl.cumsum(weight, 0) <= target).to(tl.int32)), last)


@triton.jit
def _sample(
    logits, stride, rows, uniform, temperatures, top_ps, min_ps, top_ks, tokens, vocabulary,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
    COLDEST: tl.constexpr,
):  # fmt: skip
    """One row."""
    place = tl.program_id(0)
    base = logits + tl.load(rows + place) * stride
    temperature = tl.maximum(tl.load(temperatures + place).to(tl.float32), COLDEST)
    top_p = temperature.to(tl.float64) * 0 + 1
    if TOP_P:
        top_p = tl.load(top_ps + place)
    least = temperature * 0  # in weight: min-p
    if MIN_P:
        least = tl.load(min_ps + place).to(tl.float32)
    top_k = tl.load(top_ks + place)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        values = _load(base, begin, vocabulary, BLOCK)
        largest = tl.maximum(largest, values)
        smallest = tl.minimum(smallest, tl.where(values > float("-inf"), values, float("inf")))
    peak = tl.max(largest)
    lowest = _order(tl.min(smallest), SHIFT).to(tl.int64)
    highest = _order(peak, SHIFT).to(tl.int64) + 1

    floor, ties_kept = _find_floor(
        base, vocabulary, peak, temperature, least, top_k, top_p, lowest, highest, BLOCK, SHIFT
    )
    token = _find_token(
        base, vocabulary, peak, temperature, least, floor, ties_kept, tl.load(uniform + place), BLOCK, CHUNKS, SHIFT
    )
    tl.store(tokens + place, token.to(tl.int64))
