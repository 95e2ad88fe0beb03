"""Makes steps: their arrays on the device, the forward, the next tokens, and how those come back.

On a GPU nothing here waits for the device. What a step needs goes there from pinned memory, the tokens it chooses stay
there for the next step, and a copy of them is read when it has arrived. Forwards are CUDA graphs, replayed, of layers
that are compiled once for all shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from batchgen.engine import Peers
from batchgen.engines.paged.forward import PADDED_TO, TOKENS_OF_A_BLOCK, Forward
from batchgen.engines.paged.graphs import Graphs, choose_graph_size
from batchgen.engines.paged.launched_step import LaunchedStep
from batchgen.engines.paged.layout import make_query_blocks
from batchgen.engines.paged.prompt_logprobs import find_prompt_logprobs
from batchgen.engines.paged.step import Step, StepLimits
from batchgen.engines.paged.step_buffers import StepArrays
from batchgen.generation.choosing import TokenChooser


class Runner(Forward):
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
        super().__init__(model, limits, peers)
        self.chooser = chooser
        self._kept_logits: torch.Tensor | None = None  # of decode steps with rows that need them after the graph
        self._graphs: Graphs | None = None
        self._hidden: torch.Tensor | None = None  # the last hidden states of prefill steps that are graphs

    def rehearse(self, tokens: int) -> torch.Tensor:
        hidden = super().rehearse(tokens)
        self._find_place_for_hidden(hidden)
        return hidden

    def allocate(self, pages: int) -> None:
        self._kept_logits, self._graphs = None, Graphs(self.device) if self.device.type == "cuda" else None
        super().allocate(pages)

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
        most_blocks = size // TOKENS_OF_A_BLOCK
        if len(blocks) > most_blocks:
            arrays = self._buffers.put(step, buffer_index, -(-len(step.slots) // PADDED_TO) * PADDED_TO)
            layout = self._make_layout(arrays, step.has_adapters, step.decoding, self._buffers.send(blocks))
            return arrays, self._forward(layout, self._find_token_ids(arrays))
        arrays = self._buffers.view(size)

        def compute() -> None:
            decoding, some = min(size, self.limits.slots), self._query_blocks[:most_blocks]
            layout = self._make_layout(arrays, step.has_adapters, decoding, some)
            hidden = self._forward(layout, self._find_token_ids(arrays))
            self._find_place_for_hidden(hidden)[:size] = hidden

        graph = self._graphs.find_or_capture(("prefill", size, step.has_adapters), compute, lambda: self._pad(size))
        self._buffers.put(step, buffer_index, size)
        padded = F.pad(blocks, (0, 0, 0, most_blocks - len(blocks)))
        self._query_blocks[:most_blocks] = self._buffers.send(padded)
        graph.replay()
        assert self._hidden is not None
        return arrays, self._hidden

    def _find_place_for_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """The place outside of graphs where the `hidden` states of a step are kept, for as many tokens as any step has.

        It is made in the first call, which is not captured, since a config does not tell the size for every model:
        OPT-350M's states are smaller than its `hidden_size`.
        """
        if self._hidden is None:
            self._hidden = hidden.new_zeros((self._most_tokens, hidden.shape[1]))
        return self._hidden
