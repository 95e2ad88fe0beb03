"""Sampling on a GPU, in Triton: what `sampling.sample` computes, without sorting or scanning whole vocabularies.

A program samples one row. It finds the nucleus by bisection: the floats of a row, taken as whole numbers of the same
order, are split at seven places at once, and the probability (for top-k, the number of tokens) above each of them is
summed up, until one float is left. So a row of 128,256 logits in 16 bits is read some eight times, mostly from the
cache of the GPU, where a sort in float64 moves it dozens of times.

Then it reads the row once more: the token whose scaled logit and Gumbel number have the largest sum is drawn.

Probabilities, scaled logits and sums with Gumbel numbers are float32; sums over a vocabulary and the exponential
numbers behind the Gumbel ones are float64. Nothing depends on the rows beside.
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
    seeds: torch.Tensor,
    steps: torch.Tensor,
    params: SamplingTensors,
) -> torch.Tensor:
    """Samples one token for some of the rows; see `sampling.sample_rows`.

    Args:
        logits: [all rows, vocabulary], float32, bfloat16 or float16; the logits of a row are adjacent in memory.
        rows: the sampled rows of `logits`, int64 [sampled rows].
        seeds: 64 bits each, int64 [sampled rows].
        steps: how many tokens each has generated, int64 [sampled rows].
        params: of the sampled rows.

    Returns:
        Token ids, int64 [sampled rows].
    """
    vocabulary = logits.shape[-1]
    tokens = torch.empty_like(rows)
    unused = params.temperature  # a pointer that is never read
    _sample[(len(rows),)](
        logits, logits.stride(0), rows, seeds.contiguous(), steps.contiguous(), params.temperature,
        _or(params.top_p, unused), _or(params.min_p, unused), params.top_k, tokens, vocabulary,
        TOP_P=params.top_p is not None, MIN_P=params.min_p is not None, BLOCK=_BLOCK,
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
def _keep_first(is_tie, ties, ties_kept):
    """Which of the tokens exactly at the floor are kept: the first ones, if `ties` of them come before these."""
    is_kept = is_tie
    own = tl.sum(is_tie.to(tl.int32)).to(tl.float64)
    if ties + own > ties_kept:
        place = ties + (tl.cumsum(is_tie.to(tl.int32), 0) - 1).to(tl.float64)
        is_kept = is_tie & (place < ties_kept)
    return is_kept, ties + own


@triton.jit
def _to_gumbel(word):
    """Numbers of the standard Gumbel distribution; see `random_numbers.to_gumbel`."""
    # 1 - u is exact in float64, so that its logarithm has all digits of a small u, as log1p has on the CPU.
    left = 1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log((-tl.log(left)).to(tl.float32))


@triton.jit
def _take_better(score, token, is_kept, best, best_token):
    """For each lane the better score and its token; of equal ones the one before."""
    is_better = is_kept & (score > best)
    return tl.where(is_better, score, best), tl.where(is_better, token, best_token)


@triton.jit
def _find_token(
    base, vocabulary, peak, temperature, least, floor, ties_kept, seed, step, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """The token with the largest sum of its scaled logit and its Gumbel number, among those that are kept."""
    LANES: tl.constexpr = BLOCK // 4
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], float("-inf"), tl.float32)
    best_token = tl.zeros([LANES], tl.int32) + (vocabulary - 1)
    ties = ties_kept * 0
    for begin in range(0, vocabulary, BLOCK):
        # The four words of a counter belong to four neighbouring runs of tokens: see `random_numbers.find_words`.
        values0 = _load(base, begin, vocabulary, LANES)
        values1 = _load(base, begin + LANES, vocabulary, LANES)
        values2 = _load(base, begin + 2 * LANES, vocabulary, LANES)
        values3 = _load(base, begin + 3 * LANES, vocabulary, LANES)
        kept0, ties = _find_kept(values0, peak, temperature, least, floor, ties, ties_kept, SHIFT)
        kept1, ties = _find_kept(values1, peak, temperature, least, floor, ties, ties_kept, SHIFT)
        kept2, ties = _find_kept(values2, peak, temperature, least, floor, ties, ties_kept, SHIFT)
        kept3, ties = _find_kept(values3, peak, temperature, least, floor, ties, ties_kept, SHIFT)
        if tl.max((kept0 | kept1 | kept2 | kept3).to(tl.int32)) > 0:
            counter = begin // 4 + lane
            nothing = lane * 0
            word0, word1, word2, word3 = tl.philox(seed, counter, nothing, nothing + step.to(tl.int32), nothing)
            score = (values0 - peak) / temperature + _to_gumbel(word0)
            best, best_token = _take_better(score, begin + lane, kept0, best, best_token)
            score = (values1 - peak) / temperature + _to_gumbel(word1)
            best, best_token = _take_better(score, begin + LANES + lane, kept1, best, best_token)
            score = (values2 - peak) / temperature + _to_gumbel(word2)
            best, best_token = _take_better(score, begin + 2 * LANES + lane, kept2, best, best_token)
            score = (values3 - peak) / temperature + _to_gumbel(word3)
            best, best_token = _take_better(score, begin + 3 * LANES + lane, kept3, best, best_token)
    return tl.min(tl.where(best == tl.max(best), best_token, vocabulary - 1))


@triton.jit
def _find_kept(values, peak, temperature, least, floor, ties, ties_kept, SHIFT: tl.constexpr):
    """Which of the tokens with these logits are kept, and how many at the floor have come by now."""
    order = _order(values, SHIFT)
    is_enough = _weigh(values, peak, temperature) >= least
    is_kept, ties = _keep_first(order == floor, ties, ties_kept)
    return is_enough & ((order > floor) | is_kept), ties


@triton.jit
def _sample(
    logits, stride, rows, seeds, steps, temperatures, top_ps, min_ps, top_ks, tokens, vocabulary,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
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
        base,
        vocabulary,
        peak,
        temperature,
        least,
        floor,
        ties_kept,
        tl.load(seeds + place),
        tl.load(steps + place),
        BLOCK,
        SHIFT,
    )
    tl.store(tokens + place, token.to(tl.int64))
