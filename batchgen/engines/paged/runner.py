"""Steps through a model: their arrays on the device, the forward, the next tokens, and how they come back.

On a GPU nothing here waits for the device. What a step needs goes there from pinned memory, the tokens it chooses stay
there for the next step, and a copy of them is read when it has arrived. Forwards are CUDA graphs, replayed, of layers
that are compiled once for all shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from batchgen.engines.paged import models, sampling
from batchgen.engines.paged.buffers import pinned, untouched
from batchgen.engines.paged.graphs import Graphs
from batchgen.engines.paged.graphs import size as graph_size
from batchgen.engines.paged.launched_step import Flight
from batchgen.engines.paged.layout import Layout, lay_out, query_blocks
from batchgen.engines.paged.pages import PAGE_SIZE
from batchgen.engines.paged.step import Chunk, Step
from batchgen.engines.paged.step_arrays import Arrays
from batchgen.generation.finite import are_finite
from batchgen.generation.logprobs import log_probabilities
from batchgen.models import footprint

NOT_FINITE = -1
"""In the place of a row's next token: its logits hold NaN or infinity."""

_RING = 3  # steps whose arrays may be on their way at once: one runs, one waits, one is being filled
_PROGRAMS = 528  # that keep a large GPU busy: four on each of an H100's 132 multiprocessors
_MOST_SPLITS = 16
_SPLIT_TOKENS = 128  # fewer are not worth the kernel that joins them
_RESERVED = 0.02  # of a GPU's memory
_ROUND = 64  # to which the tokens of a step without a graph are filled up
_TOKENS_OF_A_BLOCK = 16  # on average, at least, in a graph of parts of prompts; the others run without one


class Runner:
    """Runs the steps of one scheduler.

    Args:
        model: loaded, covered by `models`, on one device.
        slots: most sequences at once.
        columns: most pages of a sequence.
        budget: most tokens of a step with parts of prompts in it.
        place, ranks: of those that share the model, of which `model` is a share.
        agreed: puts the tokens that the first of them has chosen in the place of those given.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        columns: int,
        budget: int,
        place: int = 0,
        ranks: int = 1,
        agreed: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
    ) -> None:
        self._model, self._device, self._agreed = model, model.device, agreed
        self._body, self._head = model.base_model, model.get_output_embeddings()
        self._layers = models.exchange(model, place, ranks)
        self._heads = footprint.cached_heads(model.config)[0] // ranks
        self.slots, self.columns = slots, columns
        self.most = -(-max(2, slots, budget) // _ROUND) * _ROUND
        self._takes_positions = "position_ids" in inspect.signature(type(self._body).forward).parameters
        gpu = self._device.type == "cuda"
        self._table = torch.zeros((slots + 1, columns), dtype=torch.int32, device=self._device)
        self._last = torch.zeros(slots + 1, dtype=torch.long, device=self._device)
        self._next = torch.zeros(max(2, slots), dtype=torch.long, device=self._device)
        self._arrays = torch.zeros(Arrays.length(self.most), dtype=torch.int32, device=self._device)
        self._blocks = torch.zeros((self.most // _TOKENS_OF_A_BLOCK, 2), dtype=torch.int32, device=self._device)
        self._host = [pinned((Arrays.length(self.most),), torch.int32, gpu) for _ in range(_RING)]
        self._chosen = [pinned((slots,), torch.long, gpu) for _ in range(_RING)]
        self._logprobs = [pinned((slots,), torch.float32, gpu) for _ in range(_RING)]
        self._turn = self.pages = 0
        self._caches: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None  # of decode steps with rows that are sampled or ask for logprobs
        self._graphs: Graphs | None = None
        if gpu:
            size = model.config.get_text_config().hidden_size
            self._hidden = torch.zeros((self.most, size), dtype=model.dtype, device=self._device)
            for layer in self._layers:
                layer.compile(dynamic=True)

    def allocate(self, pages: int) -> None:
        """Makes the cache, in the place of one that there may be."""
        size = footprint.cached_heads(self._model.config)[1]
        self.pages = pages
        self._table.zero_()  # a larger cache had pages that this one has not
        shape = (2, pages, self._heads, PAGE_SIZE, size)
        gpu = self._device.type == "cuda"
        self._caches, self._logits, self._graphs = [], None, Graphs(self._device) if gpu else None
        if gpu:
            torch.cuda.empty_cache()
        make = torch.zeros if gpu else untouched
        self._caches = [make(shape, dtype=self._model.dtype, device=self._device) for _ in self._layers]

    def free_bytes(self) -> int:
        """Of the GPU, what is left for the cache: beside the weights and the largest forward. Compiles the model."""
        self.allocate(1)
        device = self._device
        with torch.inference_mode():
            # The compiler takes sizes that are equal in the first call for equal ones in all, so this one is odd.
            for tokens in (min(1000, self.most), self.most):
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self.rehearse(tokens)
        torch.cuda.synchronize(device)
        forward = torch.cuda.max_memory_allocated(device) - before
        self._caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # As much again for the graphs, whose memory is their own; the logits that tokens are drawn from; and something
        # for the graphs themselves, drawing, and cuBLAS.
        logits = self.slots * self._model.config.get_text_config().vocab_size * self._model.dtype.itemsize
        return int(free - 2 * forward - logits - _RESERVED * total)

    def rehearse(self, tokens: int) -> None:
        """A forward of tokens that belong to no sequence, and the next token of as many rows as there may be."""
        arrays = self._pad(tokens)
        hidden = self._forward(self._layout(arrays, 0, blocks=self._blocks[:1]), self._ids(arrays))
        rows = min(tokens, self.slots)
        self._choose(self._head(hidden[:rows]), arrays.slots[:rows])

    def launch(self, step: Step) -> Flight:
        """Starts a step; on a GPU it is only queued."""
        turn, self._turn = self._turn, (self._turn + 1) % _RING
        if len(step.table_places):
            at = self._send(torch.from_numpy(step.table_places))
            self._table.view(-1)[at] = self._send(torch.from_numpy(step.table_pages))
        rows, decoding = len(step.rows), len(step.slots) == step.decoding
        with torch.inference_mode():
            if decoding and self._graphs is not None:
                slots, logits = self._decode(step, turn)
            else:
                arrays, hidden = self._mixed(step, turn)
                if not rows:  # parts of prompts, of which none ends here
                    return Flight(step, self._chosen[turn], self._logprobs[turn], self._mark())
                at = self._send(torch.from_numpy(step.rows.astype(np.int64)))
                slots = arrays.slots[at]
                logits = self._head(hidden[at])
                self._choose(logits, slots)
            if step.is_sampled:
                if step.sequences:
                    assert logits is not None
                    sampling.draw(logits, step.sequences, self._next, self._send)
                self._last[slots] = self._agreed(self._next[:rows].clamp(min=0))
            if step.logprob_rows and step.sequences:
                assert logits is not None
                at = self._send(torch.tensor(step.logprob_rows))
                found = log_probabilities(logits, at, self._next[at].clamp(min=0))
                self._logprobs[turn][: len(step.logprob_rows)].copy_(found, non_blocking=True)
        chosen = self._chosen[turn]
        chosen[:rows].copy_(self._next[:rows], non_blocking=True)
        return Flight(step, chosen, self._logprobs[turn], self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if self._graphs is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _put(self, step: Step, turn: int, size: int) -> Arrays:
        """The step's arrays on the device, filled up to `size` tokens."""
        host, tokens = Arrays.of(self._host[turn], size), len(step.slots)
        host.decoding[0] = step.decoding
        for array, values, rest in (
            (host.slots, step.slots, self.slots),
            (host.positions, step.positions, -1),
            (host.ids, step.ids, 0),
        ):
            array.numpy()[:tokens] = values
            array.numpy()[tokens:] = rest
        length = Arrays.length(size)
        self._arrays[:length].copy_(self._host[turn][:length], non_blocking=True)
        return Arrays.of(self._arrays, size)

    def _pad(self, size: int) -> Arrays:
        """Tokens that belong to no sequence."""
        arrays = Arrays.of(self._arrays, size)
        for array, value in zip(arrays, (self.slots, -1, 0, 0), strict=True):
            array.fill_(value)
        self._blocks.zero_()
        return arrays

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._graphs is None else values.pin_memory().to(self._device, non_blocking=True)

    def _decode(self, step: Step, turn: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step in which every sequence takes one token, its tokens chosen; its slots, and its logits if wanted."""
        assert self._graphs is not None
        wanted = step.is_sampled or bool(step.logprob_rows)
        size = graph_size(len(step.slots), self.most)
        splits = self._splits(size, int(step.positions.max()) + 1)
        if self._logits is None and wanted:
            text = self._model.config.get_text_config()
            self._logits = torch.empty((len(self._next), text.vocab_size), dtype=self._model.dtype, device=self._device)
        kept = self._logits if wanted else None
        arrays = Arrays.of(self._arrays, size)
        rows = min(size, self.slots)

        def compute() -> None:
            hidden = self._forward(self._layout(arrays, size, splits=splits), self._last.index_select(0, arrays.slots))
            logits = self._head(hidden[:rows])
            self._choose(logits, arrays.slots[:rows])
            if kept is not None:
                kept[:rows] = logits

        graph = self._graphs.find((size, splits, wanted), compute, lambda: self._pad(size))
        self._put(step, turn, size)
        graph.replay()
        return arrays.slots[: len(step.slots)], kept

    def _mixed(self, step: Step, turn: int) -> tuple[Arrays, torch.Tensor]:
        """The step's arrays, and what the model makes of all its tokens, [tokens or more, hidden size]."""
        if self._graphs is None:
            arrays = self._put(step, turn, len(step.slots))
            return arrays, self._forward(self._layout(arrays, step.decoding, step.chunks), self._ids(arrays))
        blocks = query_blocks(step.chunks)
        size = graph_size(len(step.slots), self.most)
        most = size // _TOKENS_OF_A_BLOCK
        if len(blocks) > most:
            arrays = self._put(step, turn, -(-len(step.slots) // _ROUND) * _ROUND)
            layout = self._layout(arrays, step.decoding, blocks=self._send(blocks))
            return arrays, self._forward(layout, self._ids(arrays))
        arrays = Arrays.of(self._arrays, size)

        def compute() -> None:
            layout = self._layout(arrays, min(size, self.slots), blocks=self._blocks[:most])
            self._hidden[:size] = self._forward(layout, self._ids(arrays))

        graph = self._graphs.find(("mixed", size), compute, lambda: self._pad(size))
        self._put(step, turn, size)
        self._blocks[:most] = self._send(F.pad(blocks, (0, 0, 0, most - len(blocks))))
        graph.replay()
        return arrays, self._hidden

    def _choose(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        largest, best = torch.max(logits, -1)
        self._next[: len(logits)] = torch.where(are_finite(largest), best, NOT_FINITE)
        self._last[slots] = self._agreed(best)  # a step that has begun computes with it, whatever it is

    def _layout(
        self,
        arrays: Arrays,
        decoding: int,
        parts: Rows[Chunk] = (),
        *,
        blocks: torch.Tensor | None = None,
        splits: int = 1,
    ) -> Layout:
        slots, positions, _, count = arrays
        return Layout(self._caches, self._table, slots, positions, decoding, parts, count, blocks, splits)

    def _ids(self, arrays: Arrays) -> torch.Tensor:
        """Of the tokens: their own, or the one that was chosen last for their slot; [tokens]."""
        return torch.where(arrays.ids < 0, self._last.index_select(0, arrays.slots), arrays.ids.long())

    def _forward(self, layout: Layout, ids: torch.Tensor) -> torch.Tensor:
        """What the model makes of these tokens, [tokens, hidden size]."""
        arguments: dict[str, Any] = {}
        if self._takes_positions:
            arguments["position_ids"] = layout.positions.clamp(min=0).long()[None]
        with lay_out(layout):
            hidden: torch.Tensor = self._body(input_ids=ids[None], use_cache=False, **arguments).last_hidden_state[0]
        return hidden

    def _splits(self, decoding: int, longest: int) -> int:
        """Programs for each decoding sequence and head: a power of two that keeps the GPU busy with few sequences."""
        wanted = min(_MOST_SPLITS, _PROGRAMS // max(1, decoding * self._heads), longest // _SPLIT_TOKENS)
        return 1 << max(0, wanted.bit_length() - 1)
