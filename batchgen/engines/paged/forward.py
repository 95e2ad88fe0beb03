"""The forward of a model over a step's tokens that lie in pages, and its rehearsal with nothing but padding.

On a GPU, layers are compiled once for all shapes, and a rehearsal compiles them and the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from batchgen.engine import Peers
from batchgen.engines.paged import models
from batchgen.engines.paged.adapters import sort_by_adapter
from batchgen.engines.paged.alone import Alone
from batchgen.engines.paged.cache import count_token_bytes, find_dtype, find_format, make_caches
from batchgen.engines.paged.layer_groups import LayerGroups
from batchgen.engines.paged.layout import LayerCache, Layout, lay_out
from batchgen.engines.paged.step import Chunk, StepLimits
from batchgen.engines.paged.step_buffers import StepArrays, StepBuffers
from batchgen.generation.finite import are_finite
from batchgen.models import footprint

NOT_FINITE = -1
"""In the place of a row's next token: its logits hold NaN or infinity."""

TOKENS_OF_A_BLOCK = 16  # on average, at least, in a graph of prefill chunks; other steps run without one
PADDED_TO = 64
"""The tokens of a step without a graph are padded to multiples of it."""

_PROGRAMS = 528  # that keep a large GPU busy: four on each of an H100's 132 multiprocessors
_MOST_SPLITS = 16
_SPLIT_TOKENS = 128  # fewer are not worth the kernel that joins them
_RESERVED = 0.02  # of a GPU's memory
_REHEARSED_TOKENS = 1000
_REHEARSED_ROWS = (64, 16, 8)  # that decode: other kernels multiply for 16 and fewer


class Forward:
    """A patched model, the arrays of a step, and the cache.

    Args:
        model: it is loaded, covered by `models`, on one device, with its adapters, and not yet patched.
        limits: of steps and sequences.
        peers: the ranks that hold one model together, of which `model` is this rank's shard.
        compiler: the backend of `torch.compile` for the layers; "": they are not compiled; None: inductor on a GPU, and
            none elsewhere.
    """

    def __init__(self, model: Any, limits: StepLimits, peers: Peers | None = None, compiler: str | None = None) -> None:
        self._peers = peers or Alone()
        self.model, self.device, self.limits = model, model.device, limits
        self._patched = models.patch(model, self._peers)
        self._compute_logits = self._patched.compute_logits
        self.groups = self._group_layers()
        self._heads = footprint.cached_heads(model.config)[0] // self._peers.count
        slots = limits.slots
        self._most_tokens = -(-max(2, slots, limits.step_tokens) // PADDED_TO) * PADDED_TO
        self._buffers = StepBuffers(self._most_tokens, slots, self.device)
        tables = (self.groups.count, slots + 1, limits.table_width)
        self._block_tables = torch.zeros(tables, dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(slots + 1, dtype=torch.long, device=self.device)  # of each slot
        self._next_tokens = torch.zeros(max(2, slots), dtype=torch.long, device=self.device)  # of each row of the step
        blocks = self._most_tokens // TOKENS_OF_A_BLOCK
        self._query_blocks = torch.zeros((blocks, 2), dtype=torch.int32, device=self.device)
        self.pages = 0
        self._caches: list[LayerCache] = []
        if compiler is None:
            compiler = "inductor" if self.device.type == "cuda" else ""
        if compiler:
            for layer in self._patched.layers:
                layer.compile(dynamic=True, backend=compiler)

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
        had_caches, self._caches = bool(self._caches), []
        if had_caches and self.device.type == "cuda":
            torch.cuda.empty_cache()
        dtype = find_dtype(self.limits.kv_dtype, self.model.dtype)
        self._caches = make_caches(self.model.config, pages, self._peers.count, dtype, self.device, self.groups)

    def measure_free_bytes(self) -> int:
        """Of the GPU, what is free for the cache: beside the weights and the largest forward. Compiles the model."""
        self.allocate(1)
        device = self.device
        with torch.inference_mode():
            for tokens in self.rehearsed_tokens:
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

    @property
    def rehearsed_tokens(self) -> tuple[int, int]:
        """The tokens of the first forwards.

        The compiler takes sizes that are equal in the first call for equal ones in all, so the first one is odd.
        """
        return min(_REHEARSED_TOKENS, self._most_tokens), self._most_tokens

    def list_rehearsals(self) -> Sequence[Callable[[], object]]:
        """Returns forwards that together need most of the kernels that steps need: of prefill chunks, and of decoding
        sequences, many and few."""
        most = min(self._most_tokens, self.limits.slots)
        prefill: list[Callable[[], object]] = [partial(self.rehearse, tokens) for tokens in self.rehearsed_tokens]
        decode = [partial(self.rehearse_decoding, rows) for rows in (most, *_REHEARSED_ROWS) if rows <= most]
        return prefill + decode

    def rehearse(self, tokens: int) -> torch.Tensor:
        """Makes a forward of `tokens` tokens of padding, and chooses the next token of as many rows as there may be.

        Returns:
            The last hidden states, [tokens, hidden size].
        """
        arrays = self._pad(tokens)
        layout = self._make_layout(arrays, bool(self.limits.adapters), 0, self._query_blocks[:1])
        hidden = self._forward(layout, self._find_token_ids(arrays))
        rows = min(tokens, self.limits.slots)
        self._choose_best(self._compute_logits(hidden[:rows]), arrays.slots[:rows])
        return hidden

    def rehearse_decoding(self, rows: int) -> None:
        """Makes a forward of padding, in the place of this many decoding sequences, and chooses their next tokens."""
        arrays = self._pad(rows)
        ids = self._last_tokens.index_select(0, arrays.slots)
        splits = self._choose_splits(rows, _REHEARSED_TOKENS)
        hidden = self._forward(self._make_layout(arrays, False, rows, splits=splits), ids)
        self._choose_best(self._compute_logits(hidden), arrays.slots)

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

    def compute_alone(self, ids: torch.Tensor, kept: int) -> torch.Tensor:
        """Computes the logits at the last places of one sequence without pages, as `selftest.Compute` says.

        The layers get what they get in a step, so that the compiler has nothing to compile for it; the model's own
        forward gives those of a mixture more arguments.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self._compute_logits(self._patched.compute_hidden(ids[0], positions)[-kept:])

    def _choose_splits(self, decoding: int, longest: int) -> int:
        """Programs for each decoding sequence and head: a power of two that keeps the GPU busy with few sequences."""
        wanted = min(_MOST_SPLITS, _PROGRAMS // max(1, decoding * self._heads), longest // _SPLIT_TOKENS)
        return 1 << max(0, wanted.bit_length() - 1)
