"""Drawing the next tokens of rows, each with its own parameters and its own random number.

Nothing here depends on a row's position or on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchgen.types import SamplingParams

_CANDIDATES = 1024  # likeliest tokens of a row, which hold its nucleus unless the row is close to noise
_ROUNDING = 1e-9  # by which a sum of float64 may differ with the order
_ELEMENTS_AT_ONCE = 2**23  # rows x vocabulary handled at once: 64 MiB for each float64 tensor


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


def sample(logits: torch.Tensor, uniform: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """Samples one token for each row.

    Temperature comes first, then min-p, then top-k, then top-p (vLLM's order), then the inverse of the cumulative
    distribution at `uniform`, in the order of token ids.

    The order of ids, not of probabilities: two nearly equal logits that swap places between devices then move a
    boundary by a rounding error, instead of exchanging two tokens. float64, because a float32 sum over 250,000 tokens
    is too coarse.

    Args:
        logits: [rows, vocabulary].
        uniform: random numbers, one for each row: [rows], in [0, 1), float64.
        params: of the same rows.

    Returns:
        Token ids, int64 [rows].
    """
    # The maximum goes first, so that a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / params.temperature[:, None]
    if params.min_p is not None:
        # The largest is 0, so that the logarithm of a token's share of the largest probability is its own number.
        scaled = scaled.masked_fill(scaled < params.min_p.log()[:, None], -torch.inf)
    if params.max_top_k:
        scaled = _keep_top_k(scaled, params.top_k, min(params.max_top_k, scaled.shape[-1]))
    probabilities = scaled.softmax(-1)
    if params.top_p is not None:
        probabilities = _keep_nucleus(probabilities, params.top_p)
    cumulative = probabilities.cumsum(-1)
    # right=True finds the first token beyond the target, so a token of probability 0 is never found.
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return tokens.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _keep_top_k(scaled: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> torch.Tensor:
    values = scaled.topk(max_top_k, dim=-1).values
    smallest = values.gather(-1, (top_k.clamp(1, max_top_k) - 1)[:, None])
    return scaled.masked_fill((scaled < smallest) & (top_k > 0)[:, None], -torch.inf)


def _keep_nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    limited = (top_p < 1)[:, None]
    columns = _find_candidates(probabilities, top_p) if probabilities.device.type == "cpu" else None
    among = probabilities if columns is None else probabilities[:, columns]
    ordered, order = among.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p[:, None]
    dropped = torch.empty_like(dropped).scatter(-1, order, dropped)
    if columns is not None:
        dropped = torch.ones_like(probabilities, dtype=torch.bool).index_copy_(1, columns, dropped)
    return probabilities.masked_fill(dropped & limited, 0)


def _find_candidates(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor | None:
    """Returns the ids, in order, of all tokens that a row with a top-p may keep; None: there are too many of them.

    To sort a whole vocabulary takes a CPU a tenth of the time of a small model's step.
    """
    likely = probabilities.topk(min(_CANDIDATES, probabilities.shape[-1])).values[:, -1:]
    inside = (probabilities >= likely) & (probabilities > 0) & (top_p < 1)[:, None]
    enough = (inside * probabilities).sum(-1) > top_p + _ROUNDING
    if not bool((enough | (likely[:, 0] == 0) | (top_p >= 1)).all()):
        return None
    return inside.any(0).nonzero()[:, 0]


def sample_rows(
    logits: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor, params: SamplingTensors
) -> torch.Tensor:
    """Samples one token for some of the rows, in parts, since float64 takes much memory.

    Args:
        logits: [all rows, vocabulary].
        rows: the indices of the sampled rows in `logits`, int64 [sampled rows].
        uniform: as `sample` takes it, [sampled rows].
        params: of the sampled rows.

    Returns:
        Token ids, int64 [sampled rows].
    """
    size = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    tokens = torch.empty_like(rows)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        tokens[part] = sample(logits[rows[part]], uniform[part], params.part(part))
    return tokens
