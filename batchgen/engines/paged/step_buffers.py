"""How a step's arrays reach the device, and how its tokens come back, without the CPU waiting for the GPU.

All arrays of a step lie side by side in one tensor, so that one copy brings them to the device. Copies that nobody
waits for need memory of the host that is pinned, and that is not filled again before they have been made: there are
`_STEPS_AT_ONCE` of each buffer, taken in turn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from batchgen.engines.paged.step import Step
from batchgen.generation.choice import TokenLogprobs
from batchgen.generation.sampling import send

_STEPS_AT_ONCE = 3  # whose arrays may be on their way: one runs, one waits, one is being filled
_ALIGN = 16  # numbers: kernels are compiled for addresses that are multiples of 16 bytes, and again for others


class StepArrays(NamedTuple):
    """Views of a tensor of int32, which lie elsewhere for every number of tokens."""

    slots: torch.Tensor  # [tokens]: the slot of each token's sequence
    positions: torch.Tensor  # [tokens]: its position in the sequence; below 0: padding
    ids: torch.Tensor  # [tokens]: its token id; below 0: the token that was chosen last for its slot
    decoding_count: torch.Tensor  # [1]: how many of the tokens decode

    @staticmethod
    def count_numbers(tokens: int) -> int:
        """How many numbers the tensor needs for this many tokens or fewer."""
        return 3 * _align(tokens) + 1

    @staticmethod
    def view(tensor: torch.Tensor, tokens: int) -> StepArrays:
        """The arrays of a step of this many tokens in that tensor."""
        apart = _align(tokens)
        slots, positions, ids = (tensor[row * apart : row * apart + tokens] for row in range(3))
        return StepArrays(slots, positions, ids, tensor[3 * apart : 3 * apart + 1])


class StepBuffers:
    """The arrays of steps on the device, and the buffers of the host that they are copied from.

    Args:
        tokens: most tokens of a step, padding included.
        slots: most sequences at once; also the slot that padding has, which no sequence has.
        device: where steps run.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device) -> None:
        self._slots, self._device = slots, device
        self._is_gpu = device.type == "cuda"
        length = StepArrays.count_numbers(tokens)
        self._arrays = torch.zeros(length, dtype=torch.int32, device=device)
        self._host = [self._pinned(length, torch.int32) for _ in range(_STEPS_AT_ONCE)]
        self._buffer_index = 0
        # Of each of the steps at once, [slots]: the tokens that were chosen for its rows.
        self.tokens = [self._pinned(slots, torch.long) for _ in range(_STEPS_AT_ONCE)]

    def next_buffer_index(self) -> int:
        """The index of the buffers that the next step has."""
        buffer_index, self._buffer_index = self._buffer_index, (self._buffer_index + 1) % _STEPS_AT_ONCE
        return buffer_index

    def view(self, size: int) -> StepArrays:
        """The arrays on the device of a step of `size` tokens, padding included."""
        return StepArrays.view(self._arrays, size)

    def put(self, step: Step, buffer_index: int, size: int) -> StepArrays:
        """Sends the step's arrays to the device, padded to `size` tokens."""
        host, tokens = StepArrays.view(self._host[buffer_index], size), len(step.slots)
        host.decoding_count[0] = step.decoding
        for array, values, padding in (
            (host.slots, step.slots, self._slots),
            (host.positions, step.positions, -1),
            (host.ids, step.ids, 0),
        ):
            array.numpy()[:tokens] = values
            array.numpy()[tokens:] = padding
        length = StepArrays.count_numbers(size)
        self._arrays[:length].copy_(self._host[buffer_index][:length], non_blocking=True)
        return self.view(size)

    def pad(self, size: int) -> StepArrays:
        """Makes the arrays on the device those of a step of nothing but padding."""
        arrays = self.view(size)
        for array, value in zip(arrays, (self._slots, -1, 0, 0), strict=True):
            array.fill_(value)
        return arrays

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Sends a tensor of any size to the device."""
        return send(values, self._device)

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """Begins to copy a tensor of any size from the device; it is there when the stream has come so far."""
        return values.to("cpu", non_blocking=True)  # PyTorch pins that memory, and keeps it until the copy is made

    def fetch_logprobs(self, tokens: TokenLogprobs) -> TokenLogprobs:
        """The same of all the tensors of the log-probabilities of tokens tokens."""
        tensors = map(self.fetch, (tokens.logprobs, tokens.top_ids, tokens.top_logprobs))
        return TokenLogprobs(tokens.rows, *tensors)

    def _pinned(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros that a GPU can be sent without waiting, if there is one."""
        return torch.zeros(length, dtype=dtype, pin_memory=self._is_gpu)


def _align(tokens: int) -> int:
    return -(-tokens // _ALIGN) * _ALIGN
