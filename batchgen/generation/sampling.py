"""Drawing the next tokens of rows, each with its own parameters and its own random numbers.

Nothing here depends on a row's position or on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchgen.generation.random_numbers import find_all_words, find_words, to_exponential, to_gumbel
from batchgen.types import SamplingParams

_CANDIDATES, _MORE = 1024, 8  # likeliest tokens of a row, which mostly hold its nucleus; else so many times as many
_ROUNDING = 1e-9  # by which a sum of float64 may differ with the order
_ELEMENTS_AT_ONCE = 2**23  # rows x vocabulary handled at once: 64 MiB for each float64 tensor
_RANDOM_NUMBERS_AT_ONCE = 2**18  # so many stay in the caches of a CPU, and have work for some of its cores
_HOPELESS = -27.0  # scaled logits: Gumbel numbers are from -3.2 to 22.9, so that no token as far below the best wins
_FEW = 8  # a part of the vocabulary: the random words of single tokens are computed four times as often as of all
_FLOAT32_MARGIN = 1.0001  # what is computed in float32 below is off by 1e-5 at the most


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """The sampling parameters of some rows, on the device of their logits."""

    temperature: torch.Tensor  # [rows], above 0, float64
    top_k: torch.Tensor  # [rows], int64; 0 is off
    max_top_k: int  # the largest of `top_k`, which is read here without waiting for the device
    top_p: torch.Tensor | None  # [rows], float64; 1 is off; None: off for all rows
    min_p: torch.Tensor | None = None  # [rows], float64; 0 is off; None: off for all rows

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors:
        """Returns the parameters of rows that are sampled, on `device`, without waiting for it."""
        numbers = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], dtype=torch.float64).reshape(-1, 3)
        temperature, top_p, min_p = send(numbers.T.contiguous(), device)
        return cls(
            temperature,
            send(torch.tensor([p.top_k for p in params], dtype=torch.long), device),
            max((p.top_k for p in params), default=0),
            top_p if any(p.top_p < 1 for p in params) else None,
            min_p if any(p.min_p > 0 for p in params) else None,
        )

    def part(self, rows: slice | torch.Tensor) -> SamplingTensors:
        """Returns the parameters of some of these rows."""
        top_p = None if self.top_p is None else self.top_p[rows]
        min_p = None if self.min_p is None else self.min_p[rows]
        return SamplingTensors(self.temperature[rows], self.top_k[rows], self.max_top_k, top_p, min_p)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a copy of a tensor of the host on `device`; the host does not wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sample(logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """Samples one token for each row.

    Temperature comes first, then min-p, then top-k, then top-p (vLLM's order). Of the tokens that are kept, the one
    with the largest sum of its logit, divided by the temperature, and a number of the Gumbel distribution that is its
    own in this step (`random_numbers`) is drawn; of equal sums, that of the smaller id. So each token is drawn with the
    probability that the softmax of the kept tokens gives it (the Gumbel-max trick: E. J. Gumbel, 1954; C. J. Maddison,
    D. Tarlow and T. Minka, "A* Sampling", 2014).

    Logits that are rounded otherwise on another device change the draw only where the two largest sums are as close as
    the rounding, whatever the other tokens of the vocabulary have. A draw by the cumulative distribution would add up
    the rounding of all of them.

    Args:
        logits: [rows, vocabulary].
        seeds: 64 bits for each row, int64 [rows].
        steps: how many tokens each row has generated, int64 [rows].
        params: of the same rows.

    Returns:
        Token ids, int64 [rows]; any where a row's logits hold NaN or are all -inf.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()  # else the difference to the maximum is rounded to 16 bits
    # The maximum goes first, so that a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / params.temperature[:, None]
    if params.min_p is not None:
        # The largest is 0, so that the logarithm of a token's share of the largest probability is its own number.
        scaled = scaled.masked_fill(scaled < params.min_p.log()[:, None], -torch.inf)
    if params.max_top_k:
        scaled = _keep_top_k(scaled, params.top_k, min(params.max_top_k, scaled.shape[-1]))
    kept = scaled > _HOPELESS
    if params.top_p is not None:
        kept &= _find_nucleus(scaled.softmax(-1), params.top_p)
    _leave_contenders(kept, scaled, seeds, steps)
    rows, tokens = kept.nonzero(as_tuple=True)
    sums = scaled[rows, tokens] + to_gumbel(find_words(seeds[rows], steps[rows], tokens))
    largest = sums.new_full(seeds.shape, -torch.inf).scatter_reduce(0, rows, sums, "amax")
    ids = tokens.where(sums == largest[rows], logits.shape[-1])
    drawn = torch.full_like(seeds, logits.shape[-1]).scatter_reduce(0, rows, ids, "amin")
    return drawn.clamp(max=logits.shape[-1] - 1)


def _leave_contenders(kept: torch.Tensor, scaled: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor) -> None:
    """Drops tokens that cannot have the largest sum from the rows in which `kept` has many.

    The largest sum belongs to the smallest exponential number divided by the token's probability. The uniform number
    is a lower bound of the exponential one and takes no logarithm, so that few tokens remain for which that is taken.
    """
    many = (kept.sum(-1) > kept.shape[-1] // _FEW).nonzero()[:, 0]
    size = max(1, _RANDOM_NUMBERS_AT_ONCE // kept.shape[-1])
    for begin in range(0, len(many), size):
        rows = many[begin : begin + size]
        words = find_all_words(seeds[rows], steps[rows], kept.shape[-1])
        weights = scaled[rows].float().neg_().exp_()
        bounds = words.float().add_(0.5).mul_(2.0**-32).mul_(weights)
        likely = torch.where(kept[rows], bounds, torch.inf).min(-1, keepdim=True).indices
        reached = to_exponential(words.gather(-1, likely)) * weights.gather(-1, likely)
        kept[rows] &= bounds <= reached * _FLOAT32_MARGIN


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> torch.Tensor:
    values = scaled.topk(max_top_k, dim=-1).values
    smallest = values.gather(-1, (top_k.clamp(1, max_top_k) - 1)[:, None])
    return scaled.masked_fill((scaled < smallest) & (top_k > 0)[:, None], -torch.inf)


def _find_nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Returns which tokens a row with a top-p keeps, and all of a row without: bool [rows, vocabulary].

    The likeliest tokens are kept until they have `top_p` together, of equal ones those with the smaller ids. To sort a
    whole vocabulary takes a CPU a tenth of the time of a small model's step, so that few tokens are tried first.
    """
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    count, rows = _CANDIDATES, (top_p < 1).nonzero()[:, 0]
    while len(rows):
        count = min(count, probabilities.shape[-1])
        own, wanted = probabilities[rows], top_p[rows][:, None]
        ordered = own.topk(count).values
        sums = ordered.cumsum(-1)
        numbers = (sums - ordered < wanted).sum(-1, keepdim=True).clamp(min=1)  # none, where a row holds NaN
        least = ordered.gather(-1, numbers - 1)
        above, ties = own > least, own == least
        room = numbers - above.sum(-1, keepdim=True)
        if bool((ties.sum(-1, keepdim=True) > room).any()):
            ties &= ties.cumsum(-1) <= room
        kept[rows] = above | ties
        is_short = sums[:, -1:] <= wanted + _ROUNDING
        rows = rows[is_short[:, 0]] if count < probabilities.shape[-1] else rows[:0]
        count *= _MORE
    return kept


def sample_rows(
    logits: torch.Tensor, rows: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, params: SamplingTensors
) -> torch.Tensor:
    """Samples one token for some of the rows: on a GPU by a kernel, elsewhere in parts, as float64 takes much memory.

    Args:
        logits: [all rows, vocabulary].
        rows: the indices of the sampled rows in `logits`, int64 [sampled rows].
        seeds: of the sampled rows, as `sample` takes them.
        steps: the same.
        params: of the sampled rows.

    Returns:
        Token ids, int64 [sampled rows].
    """
    if logits.is_cuda:
        from batchgen.generation import sampling_kernel  # Triton comes with a torch for GPUs alone

        return sampling_kernel.sample(logits, rows, seeds, steps, params)
    size = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    tokens = torch.empty_like(rows)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        tokens[part] = sample(logits[rows[part]], seeds[part], steps[part], params.part(part))
    return tokens
