"""Makes steps: their arrays on the device, the forward, the next tokens, and how those come back.

On a GPU nothing here waits for the device. What a step needs goes there from pinned memory, the tokens it chooses stay
there for the next step, and a copy of them is read when it has arrived. Forwards are CUDA graphs, replayed, of layers
that are compiled once for all shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from batchgen.engine import Peers
from batchgen.engines.paged import models
from batchgen.engines.paged.adapters import sort_by_adapter
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.cache import count_token_bytes, find_dtype, find_format, make_caches
from batchgen.engines.paged.graphs import Graphs, choose_graph_size
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.layout import LayerCache, Layout, lay_out, make_query_blocks
from batchgen.engines.paged.prompt_logprobs import find_prompt_logprobs
from batchgen.engines.paged.step import Chunk, Step, StepLimits
from batchgen.engines.paged.step_buffers import StepArrays, StepBuffers
from batchgen.generation.choosing import TokenChooser
from batchgen.generation.finite import are_finite
from batchgen.models import footprint

NOT_FINITE = -1
"""In the place of a row's next token: its logits hold NaN or infinity."""

_PROGRAMS = 528  # that keep a large GPU busy: four on each of an H100's 132 multiprocessors
_MOST_SPLITS = 16
_SPLIT_TOKENS = 128  # fewer are not worth the kernel that joins them
_RESERVED = 0.02  # of a GPU's memory
_PADDED_TO = 64  # multiples of it: the tokens of a step without a graph
_TOKENS_OF_A_BLOCK = 16  # on average, at least, in a graph of prefill chunks; other steps run without one


class Runner:
    """Makes the steps of one scheduler.

    Args:
        model: it is loaded, covered by `models`, on one device, with its adapters, and not yet patched.
        limits: of steps and sequences.
        peers: the ranks that hold one model together, of which `model` is this rank's shard.
        chooser: of the next tokens of rows that need more than the largest logit, by their slots; None: another rank
            chooses them.
    """

    def __init__(
        self, model: Any, limits: StepLimits, peers: Peers | None = None, chooser: TokenChooser | None = None
    ) -> None:
        self._peers, self.chooser = peers or Alone(), chooser
        self.model, self.device, self.limits = model, model.device, limits
        self._patched = models.patch(model, self._peers)
        self._compute_logits = self._patched.compute_logits
        self.groups = self._group_layers()
        self._heads = footprint.cached_heads(model.config)[0] // self._peers.count
        slots = limits.slots
        self._most_tokens = -(-max(2, slots, limits.step_tokens) // _PADDED_TO) * _PADDED_TO
        self._buffers = StepBuffers(self._most_tokens, slots, self.device)
        tables = (self.groups.count, slots + 1, limits.table_width)
        self._block_tables = torch.zeros(tables, dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(slots + 1, dtype=torch.long, device=self.device)  # of each slot
        self._next_tokens = torch.zeros(max(2, slots), dtype=torch.long, device=self.device)  # of each row of the step
        blocks = self._most_tokens // _TOKENS_OF_A_BLOCK
        self._query_blocks = torch.zeros((blocks, 2), dtype=torch.int32, device=self.device)
        self.pages = 0
        self._caches: list[LayerCache] = []
        self._kept_logits: torch.Tensor | None = None  # of decode steps with rows that need them after the graph
        self._graphs: Graphs | None = None
        if self.device.type == "cuda":
            size = model.config.get_text_config().hidden_size
            self._hidden = torch.zeros((self._most_tokens, size), dtype=model.dtype, device=self.device)
            for layer in self._patched.layers:
                layer.compile(dynamic=True)

    @property
    def token_bytes(self) -> int:
        """Bytes that a rank's cache has for a token in all layers."""
        kept = find_format(self.limits.kv_dtype, self.model.dtype)
        return count_token_bytes(self.model.config, self._peers.count, kept, self.groups)

    def _group_layers(self) -> LayerGroups:
        """The groups of the model's layers, by the windows that they ask attention for; not by what the config says,
        which has windows that its model does not use."""
        layers = footprint.list_layer_caches(self.model.config)
        windows = self._patched.find_windows() if any(layer.window for layer in layers) else [0] * len(layers)
        return LayerGroups.of(layers, windows, self.limits.sequence_tokens)

    def allocate(self, pages: int) -> None:
        """Makes a cache of `pages` pages for tokens in all layers, in the place of the one that there may be."""
        self.pages = pages
        self._block_tables.zero_()  # a larger cache had pages that this one has not
        gpu = self.device.type == "cuda"
        self._caches, self._kept_logits, self._graphs = [], None, Graphs(self.device) if gpu else None
        if gpu:
            torch.cuda.empty_cache()
        dtype = find_dtype(self.limits.kv_dtype, self.model.dtype)
        self._caches = make_caches(self.model.config, pages, self._peers.count, dtype, self.device, self.groups)

    def measure_free_bytes(self) -> int:
        """Of the GPU, what is free for the cache: beside the weights and the largest forward. Compiles the model."""
        self.allocate(1)
        device = self.device
        with torch.inference_mode():
            # The compiler takes sizes that are equal in the first call for equal ones in all, so this one is odd.
            for tokens in (min(1000, self._most_tokens), self._most_tokens):
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self.rehearse(tokens)
        torch.cuda.synchronize(device)
        forward = torch.cuda.max_memory_allocated(device) - before
        self._caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # The same amount again, since graphs have a separate pool; the logits that tokens are drawn from; and something
        # for the graphs themselves, drawing, and cuBLAS.
        logits = self.limits.slots * self.model.config.get_text_config().vocab_size * self.model.dtype.itemsize
        return int(free - 2 * forward - logits - _RESERVED * total)

    def rehearse(self, tokens: int) -> None:
        """Makes a forward of `tokens` tokens of padding, and chooses the next token of as many rows as there may be."""
        arrays = self._pad(tokens)
        layout = self._make_layout(arrays, bool(self.limits.adapters), 0, self._query_blocks[:1])
        hidden = self._forward(layout, self._find_token_ids(arrays))
        rows = min(tokens, self.limits.slots)
        self._choose_best(self._compute_logits(hidden[:rows]), arrays.slots[:rows])

    def launch(self, step: Step) -> LaunchedStep:
        """Starts a step; on a GPU it is only queued.

        Where a row awaits the token of the step before, only the forward is started, and `choose` has to follow.
        """
        buffer_index = self._buffers.next_buffer_index()
        self._begin_rows(step)
        self._update_block_table(step)
        places = step.slots[step.rows].tolist() if step.needs_chooser else []
        launched = LaunchedStep(step, places, None, None, self._buffers.tokens[buffer_index])
        with torch.inference_mode():
            if len(step.slots) == step.decoding and self._graphs is not None:
                launched.slots, launched.logits = self._decode(step, buffer_index)
            else:
                arrays, hidden = self._prefill(step, buffer_index)
                launched.prompt_logprobs = find_prompt_logprobs(step, hidden, self._compute_logits, self._buffers)
                if len(step.rows):
                    rows = self._buffers.send(torch.from_numpy(step.rows.astype(np.int64)))
                    launched.slots = arrays.slots[rows]
                    launched.logits = self._compute_logits(hidden[rows])
                    self._choose_best(launched.logits, launched.slots)
        if not (step.needs_chooser and any(sequence.awaits_tokens for sequence in step.sequences)):
            self.choose(launched)
        return launched

    def choose(self, launched: LaunchedStep) -> None:
        """Starts the choice of the step's tokens, and their way back, unless `launch` has done so.

        Call it only after every token that one of its rows awaits has been given to the chooser.
        """
        if launched.is_choice_launched:
            return
        step, rows = launched.step, len(launched.step.rows)
        with torch.inference_mode():
            tokens = self._next_tokens[:rows]
            if step.needs_chooser and self.chooser is not None:
                assert launched.logits is not None
                chosen = self.chooser.choose(launched.logits, launched.places, tokens)
                tokens = chosen.tokens
                launched.logprobs = chosen.logprobs and self._buffers.fetch_logprobs(chosen.logprobs)
            if step.needs_chooser:
                self._last_tokens[launched.slots] = self._peers.tokens(tokens.clamp(min=0))
            launched.tokens[:rows].copy_(tokens, non_blocking=True)
        launched.logits, launched.is_choice_launched = None, True
        if self._graphs is not None:
            launched.arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.arrival.record()

    def _begin_rows(self, step: Step) -> None:
        """Tells the chooser of the rows that get their first token in this step, or the first since a preemption."""
        if self.chooser is not None:
            for sequence in step.sequences[step.decoding :]:
                generated = sequence.tokens[sequence.prompt_tokens :]
                self.chooser.begin(sequence.slot, sequence.prompt, generated)
                sequence.awaits_tokens = self.chooser.awaits_tokens(sequence.slot)

    def _update_block_table(self, step: Step) -> None:
        if len(step.table_places):
            places = self._buffers.send(torch.from_numpy(step.table_places))
            self._block_tables.view(-1)[places] = self._buffers.send(torch.from_numpy(step.table_pages))

    def _decode(self, step: Step, buffer_index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Makes a step in which every sequence decodes, and chooses the best tokens.

        Returns:
            The slots of its rows, [rows], and their logits, [rows or more, vocabulary], if the step needs them.
        """
        assert self._graphs is not None
        needs_logits = step.needs_chooser
        size = choose_graph_size(len(step.slots), self._most_tokens)
        splits = self._choose_splits(size, int(step.positions.max()) + 1)
        if self._kept_logits is None and needs_logits:
            shape = (len(self._next_tokens), self.model.config.get_text_config().vocab_size)
            self._kept_logits = torch.empty(shape, dtype=self.model.dtype, device=self.device)
        kept = self._kept_logits if needs_logits else None
        arrays = self._buffers.view(size)
        rows = min(size, self.limits.slots)

        def compute() -> None:
            ids = self._last_tokens.index_select(0, arrays.slots)
            hidden = self._forward(self._make_layout(arrays, step.has_adapters, size, splits=splits), ids)
            logits = self._compute_logits(hidden[:rows])
            self._choose_best(logits, arrays.slots[:rows])
            if kept is not None:
                kept[:rows] = logits

        key = (size, splits, needs_logits, step.has_adapters)
        graph = self._graphs.find_or_capture(key, compute, lambda: self._pad(size))
        self._buffers.put(step, buffer_index, size)
        graph.replay()
        return arrays.slots[: len(step.slots)], kept

    def _prefill(self, step: Step, buffer_index: int) -> tuple[StepArrays, torch.Tensor]:
        """Makes the forward of a step with prefill chunks, or of any step without graphs.

        Returns:
            Its arrays, and the last hidden states of all its tokens, [tokens or more, hidden size].
        """
        if self._graphs is None:
            arrays = self._buffers.put(step, buffer_index, len(step.slots))
            layout = self._make_layout(arrays, step.has_adapters, step.decoding, chunks=step.chunks)
            return arrays, self._forward(layout, self._find_token_ids(arrays))
        blocks = make_query_blocks(step.chunks)
        size = choose_graph_size(len(step.slots), self._most_tokens)
        most_blocks = size // _TOKENS_OF_A_BLOCK
        if len(blocks) > most_blocks:
            arrays = self._buffers.put(step, buffer_index, -(-len(step.slots) // _PADDED_TO) * _PADDED_TO)
            layout = self._make_layout(arrays, step.has_adapters, step.decoding, self._buffers.send(blocks))
            return arrays, self._forward(layout, self._find_token_ids(arrays))
        arrays = self._buffers.view(size)

        def compute() -> None:
            decoding, some = min(size, self.limits.slots), self._query_blocks[:most_blocks]
            layout = self._make_layout(arrays, step.has_adapters, decoding, some)
            self._hidden[:size] = self._forward(layout, self._find_token_ids(arrays))

        graph = self._graphs.find_or_capture(("prefill", size, step.has_adapters), compute, lambda: self._pad(size))
        self._buffers.put(step, buffer_index, size)
        padded = F.pad(blocks, (0, 0, 0, most_blocks - len(blocks)))
        self._query_blocks[:most_blocks] = self._buffers.send(padded)
        graph.replay()
        return arrays, self._hidden

    def _choose_best(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Chooses the best token of each row, from `logits` [rows, vocabulary], for the sequences in `slots` [rows]."""
        largest, best = torch.max(logits, -1)
        self._next_tokens[: len(logits)] = torch.where(are_finite(largest), best, NOT_FINITE)
        # The step that is planned before this one is read computes with it, whatever it is.
        self._last_tokens[slots] = self._peers.tokens(best)

    def _pad(self, size: int) -> StepArrays:
        """A step of nothing but padding."""
        self._query_blocks.zero_()
        return self._buffers.pad(size)

    def _make_layout(
        self,
        arrays: StepArrays,
        has_adapters: bool,
        decoding: int,
        blocks: torch.Tensor | None = None,
        splits: int = 1,
        chunks: Sequence[Chunk] = (),
    ) -> Layout:
        """The layout of a step: `blocks` and `splits` on a GPU, `chunks` elsewhere."""
        slots, positions, _, decoding_count = arrays
        tables, count = self._block_tables, len(self.limits.adapters)
        rest = (decoding_count, blocks, splits, self.groups, tables if self.groups.count > 1 else None)
        layout = Layout(self._caches, tables[0], slots, positions, decoding, chunks, *rest)
        return replace(layout, adapters=sort_by_adapter(layout.adapter_numbers, count)) if has_adapters else layout

    def _find_token_ids(self, arrays: StepArrays) -> torch.Tensor:
        """[tokens]: the tokens' own ids, or the one that was chosen last for their slot."""
        return torch.where(arrays.ids < 0, self._last_tokens.index_select(0, arrays.slots), arrays.ids.long())

    def _forward(self, layout: Layout, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states of these tokens, [tokens, hidden size]."""
        with lay_out(layout):
            return self._patched.compute_hidden(ids, layout.positions)

    def _choose_splits(self, decoding: int, longest: int) -> int:
        """Programs for each decoding sequence and head: a power of two that keeps the GPU busy with few sequences."""
        wanted = min(_MOST_SPLITS, _PROGRAMS // max(1, decoding * self._heads), longest // _SPLIT_TOKENS)
        return 1 << max(0, wanted.bit_length() - 1)
