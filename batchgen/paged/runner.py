"""Steps through a model: their arrays on the device, the forward, the next tokens, and how they come back.

On a GPU nothing here waits for the device. What a step needs goes there from pinned memory, the tokens it chooses stay
there for the next step, and a copy of them is read when it has arrived. A step in which every sequence takes one token
is a CUDA graph, replayed; others run layer by layer, each compiled once for all shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchgen.paged import models, sampling
from batchgen.paged.attention import Layout, over
from batchgen.paged.graphs import Graphs
from batchgen.paged.pages import SIZE
from batchgen.paged.step import Part, Step

_RING = 3  # steps whose arrays may be on their way at once: one runs, one waits, one is being filled
_PROGRAMS = 528  # that keep a large GPU busy: four on each of an H100's 132 multiprocessors
_MOST_SPLITS = 16
_SPLIT_TOKENS = 128  # fewer are not worth the kernel that joins them
_ROUND = 64  # to which the tokens of a step are filled up


@dataclass
class Flight:
    """A step under way."""

    step: Step
    _tokens: torch.Tensor
    _arrived: torch.cuda.Event | None

    def read(self) -> list[int]:
        """The tokens chosen for the step's rows; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tokens[: len(self.step.rows)].tolist()


class Runner:
    """Runs the steps of one scheduler.

    Args:
        model: loaded, covered by `models`, on one device.
        slots: most sequences at once.
        columns: most pages of a sequence.
        budget: most tokens of a step with parts of prompts in it.
    """

    def __init__(self, model: Any, *, slots: int, columns: int, budget: int) -> None:
        self._model, self._device = model, model.device
        self._layers = models.exchange(model)
        self.slots, self.columns = slots, columns
        self.most = -(-max(slots, budget) // _ROUND) * _ROUND
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        gpu = self._device.type == "cuda"
        self._table = torch.zeros((slots + 1, columns), dtype=torch.int32, device=self._device)
        self._last = torch.zeros(slots + 1, dtype=torch.long, device=self._device)
        self._next = torch.zeros(max(2, slots), dtype=torch.long, device=self._device)
        self._arrays = torch.zeros((3, self.most), dtype=torch.int32, device=self._device)
        self._host = [_pinned((3, self.most), torch.int32, gpu) for _ in range(_RING)]
        self._chosen = [_pinned((slots,), torch.long, gpu) for _ in range(_RING)]
        self._turn = 0
        self._caches: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._graphs = Graphs(slots, self._device) if gpu else None
        if gpu:
            for layer in self._layers:
                layer.compile(dynamic=True)

    def bytes_per_page(self) -> int:
        """Of all layers together."""
        heads, size = self._heads()
        return len(self._layers) * 2 * heads * SIZE * size * self._model.dtype.itemsize

    def allocate(self, pages: int) -> None:
        """Makes the cache."""
        heads, size = self._heads()
        shape = (2, pages, heads, SIZE, size)
        self._caches = [torch.zeros(shape, dtype=self._model.dtype, device=self._device) for _ in self._layers]

    def free_bytes(self) -> int:
        """Of the GPU, what is left for the cache: beside the weights and the largest forward. Compiles the model."""
        self.allocate(1)
        device = self._device
        with torch.inference_mode():
            # The compiler takes sizes that are equal in the first call for equal ones in all, so this one is odd.
            for tokens in (min(1000, self.most), self.most):
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self._pad(0, tokens)
                rows = torch.arange(min(self.slots, tokens), device=device)
                logits = self._forward(tokens, 0, (), None, rows)
                logits.argmax(-1)
                del logits
        torch.cuda.synchronize(device)
        forward = torch.cuda.max_memory_allocated(device) - before
        self._caches = []
        torch.cuda.empty_cache()
        # As much again for the graphs, whose memory is their own, and something for drawing tokens and cuBLAS.
        return int(torch.cuda.mem_get_info(device)[0]) - 2 * forward - (1 << 30)

    def launch(self, step: Step) -> Flight:
        """Starts a step; on a GPU it is only queued."""
        turn, self._turn = self._turn, (self._turn + 1) % _RING
        if len(step.table_at):
            at = self._send(torch.from_numpy(step.table_at))
            self._table.view(-1)[at] = self._send(torch.from_numpy(step.table_to))
        tokens, rows = len(step.slots), len(step.rows)
        decoding = tokens == step.decoding
        with torch.inference_mode():
            sampled = any(sequence.prompt.params.temperature > 0 for sequence in step.sequences)
            if decoding and self._graphs is not None:
                logits = self._replay(step, turn, sampled)
            else:
                size = tokens if self._graphs is None else -(-tokens // _ROUND) * _ROUND
                self._put(step, turn, size)
                at = None if decoding else self._send(torch.from_numpy(step.rows.astype(np.int64)))
                splits = self._splits(step.decoding, int(step.positions.max()) + 1)
                logits = self._forward(size, step.decoding, step.parts, self._blocks(step.parts), at, splits)
                self._choose(logits, self._arrays[0, :tokens] if at is None else self._arrays[0, at])
            if sampled:
                sampling.draw(logits, step.sequences, self._next)
                slots = self._arrays[0, :tokens] if decoding else self._arrays[0, at]
                self._last[slots.long()] = self._next[:rows]
        chosen = self._chosen[turn]
        chosen[:rows].copy_(self._next[:rows], non_blocking=True)
        return Flight(step, chosen, self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if self._graphs is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _put(self, step: Step, turn: int, size: int) -> None:
        """The step's arrays, filled up to `size` tokens."""
        host, tokens = self._host[turn].numpy(), len(step.slots)
        for row, values, rest in ((0, step.slots, self.slots), (1, step.positions, -1), (2, step.ids, 0)):
            host[row, :tokens] = values
            host[row, tokens:size] = rest
            self._arrays[row, :size].copy_(self._host[turn][row, :size], non_blocking=True)

    def _pad(self, begin: int, end: int) -> None:
        """Tokens that belong to no sequence."""
        self._arrays[0, begin:end] = self.slots
        self._arrays[1, begin:end] = -1
        self._arrays[2, begin:end] = 0

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._graphs is None else values.pin_memory().to(self._device, non_blocking=True)

    def _blocks(self, parts: Rows[Part]) -> torch.Tensor | None:
        """The parts in pieces as the kernels take them, the longest way back first."""
        if self._graphs is None or not parts:
            return None
        from batchgen.paged.kernels import QUERIES

        ordered = sorted(parts, key=lambda part: -part.length)
        pieces = [
            (part.first + begin, min(QUERIES, part.count - begin))
            for part in ordered
            for begin in range(0, part.count, QUERIES)
        ]
        return self._send(torch.tensor(pieces, dtype=torch.int32))

    def _replay(self, step: Step, turn: int, sampled: bool) -> torch.Tensor:
        """A pure decode step, as a graph; its logits, which are kept only if a row of the step is sampled."""
        assert self._graphs is not None
        size = self._graphs.size(len(step.slots))
        splits = self._splits(size, int(step.positions.max()) + 1)
        if sampled and self._logits is None:
            text = self._model.config.get_text_config()
            self._logits = torch.empty((len(self._next), text.vocab_size), dtype=self._model.dtype, device=self._device)

        def decode() -> None:
            self._arrays[2, :size] = -1
            logits = self._forward(size, size, (), None, None, splits)
            self._choose(logits, self._arrays[0, :size])
            if sampled:
                self._logits[:size] = logits  # type: ignore[index]

        graph = self._graphs.find((size, splits, sampled), decode, lambda: self._pad(0, size))
        self._put(step, turn, size)
        graph.replay()
        return self._logits  # type: ignore[return-value]

    def _choose(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        best = logits.argmax(-1)
        self._next[: len(best)] = best
        self._last[slots.long()] = best

    def _forward(
        self,
        tokens: int,
        decoding: int,
        parts: Rows[Part],
        blocks: torch.Tensor | None,
        rows: torch.Tensor | None,
        splits: int = 1,
    ) -> torch.Tensor:
        """Logits, [rows, vocabulary], of `rows` or of all tokens."""
        slots, positions, ids = self._arrays[:, :tokens]
        ids = torch.where(ids < 0, self._last[slots.long()], ids.long())
        arguments: dict[str, Any] = {"use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = positions.clamp(min=0).long()[None]
        if rows is not None:
            arguments["logits_to_keep"] = rows
        layout = Layout(self._caches, self._table, slots, positions, decoding, parts, blocks, splits)
        with over(layout):
            logits: torch.Tensor = self._model(input_ids=ids[None], **arguments).logits[0]
        return logits

    def _splits(self, decoding: int, longest: int) -> int:
        """Programs for each decoding sequence and head: a power of two that keeps the GPU busy with few sequences."""
        heads, _ = self._heads()
        wanted = min(_MOST_SPLITS, _PROGRAMS // max(1, decoding * heads), longest // _SPLIT_TOKENS)
        return 1 << max(0, wanted.bit_length() - 1)

    def _heads(self) -> tuple[int, int]:
        """Of keys and values: heads, and the size of one."""
        text = self._model.config.get_text_config()
        heads = text.num_attention_heads
        kept = getattr(text, "num_key_value_heads", None) or heads
        return kept, getattr(text, "head_dim", None) or text.hidden_size // heads


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, gpu: bool) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=gpu)
