"""The next tokens of rows that are sampled, on the device, drawn with each row's own random numbers.

The same function and the same numbers as every other engine has (`generation.sampling.sample_rows`, `Prompt.row_seed`),
so that a row is sampled alike whatever it runs beside, and wherever it is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from batchgen.engines.paged.step import Sequence
from batchgen.engines.paged.step_buffers import StepBuffers
from batchgen.generation.sampling import SamplingTensors, sample_rows


def draw(logits: torch.Tensor, sequences: Rows[Sequence], tokens: torch.Tensor, buffers: StepBuffers) -> None:
    """Draws the tokens of sampled rows.

    Args:
        logits: [rows or more, vocabulary].
        sequences: of the rows, at least one of them sampled; each of those draws its next random number.
        tokens: the best token ids, [rows or more], which the drawn ones replace; one below 0, which says why there is
            none, stays.
        buffers: of the steps, which send the random numbers to the device.
    """
    sampled = [row for row, sequence in enumerate(sequences) if sequence.prompt.params.temperature > 0]
    params = [sequences[row].prompt.params for row in sampled]
    numbers = [[p.temperature, p.top_p, sequences[row].random.random()] for row, p in zip(sampled, params, strict=True)]
    temperature, top_p, uniform = buffers.send(torch.tensor(numbers, dtype=torch.float64)).unbind(1)
    rows, top_k = buffers.send(torch.tensor([sampled, [p.top_k for p in params]]))
    nucleus = top_p if any(p.top_p < 1 for p in params) else None
    tensors = SamplingTensors(temperature, top_k, max(p.top_k for p in params), nucleus)
    drawn = sample_rows(logits, rows, uniform, tensors)
    tokens[rows] = torch.where(tokens[rows] < 0, tokens[rows], drawn)
