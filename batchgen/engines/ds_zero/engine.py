"""Engine `ds-zero`: DeepSpeed ZeRO stage 3. The weights are sharded over all ranks, and every rank is a stream.

Each forward gathers the weights layer by layer (`gather`; from NVMe DeepSpeed does), so all ranks must call forward
equally often, and that is all they must do together. Before each forward they add up two flags (`_agree`): who has
work, and whether one has been asked to stop. A rank without work takes part with a token of its own making until nobody
has any; a rank that finishes a batch begins its next one while the others are in the middle of theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from batchgen import device
from batchgen.engine import Engine, EngineError, Pace, Placement, Setup, Tokenizer
from batchgen.engines.ds_zero import bandwidth, checks, deepspeed_config
from batchgen.engines.ds_zero.decoder_layers import are_layers_listed, find_layers
from batchgen.engines.ds_zero.gather import LayerGatherer, raise_out_of_step
from batchgen.engines.ds_zero.offload import NvmeSettings
from batchgen.engines.ds_zero.prepare_offload import PreparedOffload, prepare_cpu, prepare_nvme
from batchgen.engines.ds_zero.quantization import check_quantization, make_quantization_section, plan_quantized
from batchgen.generation.greedy import LoadedModel
from batchgen.generation.sizing import BatchSizing
from batchgen.generation.static_batches import StaticBatches
from batchgen.models import architectures, loading
from batchgen.models.parameters import Parameters, list_parameters
from batchgen.models.tokenizer import HfTokenizer, tokenizer_of
from batchgen.tensor_parallel import process_group
from batchgen.types import Batch, Prompt

_MOST_ROWS = 8192  # of a batch with offload: an H100 computes as long as 54 GB/s bring weights at about 10,000 rows


class _Stopped(Exception):
    """All ranks have seen, before the same forward, that one of them is to stop."""


class DsZero(Engine):
    """Holds a share of the weights on every rank. Each rank is a stream."""

    calls_together = True
    needed_packages = ("deepspeed", "accelerate")
    pace = Pace(layer_seconds=0.00062, shared_layer_seconds=0.0011)  # H100s and H200s, one to four

    @dataclass(frozen=True)
    class Options:
        """Settings of engine `ds-zero`. Sizes are DeepSpeed's, in elements; given one, DeepSpeed itself gathers."""

        config: str | None = None  # a DeepSpeed JSON file; what it says wins over everything here
        offload: str | None = None  # where the weights wait for their layer: cpu, or nvme=FOLDER; None: on the GPUs
        pin_memory: bool = True  # of offloaded weights: faster copies, memory that cannot be swapped
        reduce_bucket_size: int | None = None  # None: hidden size squared, as in transformers-bloom-inference
        prefetch_bucket_size: int | None = None  # None: a layer; without whole_layers 0.9 x hidden size squared
        param_persistence_threshold: int | None = None  # smaller ones stay whole on every rank; None: none do
        whole_layers: bool = True  # gather a decoder layer at once; false: DeepSpeed each part when its turn comes
        max_live_parameters: int | None = None  # gathered at a time; None: three layers and what is tied
        max_reuse_distance: int | None = None  # until its next use a parameter stays; None: any
        weight_bits: int | None = None  # 8 or 4: the weights are rounded to this many bits, which changes the text
        weight_group: int = 64  # weights that share a scale
        attn_implementation: str | None = None  # None: Transformers' choice
        timeout_seconds: float = 600.0  # without an answer from a rank, its peers end

        @property
        def is_gathered_by_deepspeed(self) -> bool:
            """Whether DeepSpeed itself gathers weights: one of its settings asks for it, or it alone can."""
            settings = (self.config, self.weight_bits, self.reduce_bucket_size, self.prefetch_bucket_size)
            limits = (self.param_persistence_threshold, self.max_live_parameters, self.max_reuse_distance)
            nvme = (self.offload or "").startswith("nvme")
            return nvme or not self.whole_layers or any(setting is not None for setting in (*settings, *limits))

        def __post_init__(self) -> None:
            kind, _, folder = (self.offload or "cpu").partition("=")
            if kind not in ("cpu", "nvme") or (kind == "nvme") != bool(folder):
                raise EngineError(f"offload={self.offload}: must be cpu, or nvme=FOLDER")
            if self.weight_bits not in (None, 4, 8):
                raise EngineError(f"weight_bits={self.weight_bits}: must be 4 or 8")

    @classmethod
    def placements(cls, config: Any, weights: Any, gpus: int) -> list[Placement]:
        if architectures.why_not_sharded(config):
            return []
        size, shared = weights.read_bytes, weights.shared_bytes
        gathered = deepspeed_config.estimate_gathered_bytes(weights)
        held = Placement((), gpus, gpus, device=size)
        if gpus > 1:
            part = -(-shared // gpus)
            held = Placement((), gpus, gpus, device=part, gathered=gathered, moved=shared - part, path="gpus")
        away = Placement(("offload=cpu",), gpus, gpus, 0, gathered, moved=shared // gpus, most_rows=_MOST_ROWS)
        host = replace(away, host=shared, path="host")
        files = weights.shard_bytes(gpus) * gpus
        disk = replace(away, settings=("offload=nvme=FOLDER",), disk=files, moved=size // gpus, path="disk")
        return [held, host, disk]

    @classmethod
    def check(cls, setup: Setup, tokenizer: Any, options: Options) -> None:
        super().check(setup, tokenizer, options)
        kind, _, folder = (options.offload or "").partition("=")
        if kind == "nvme":
            checks.check_folder(Path(folder))
        if options.config is not None:
            deepspeed_config.read_user_configuration(options.config)

    @classmethod
    def tokenizer(cls, model: str) -> Tokenizer:
        return HfTokenizer(model)

    def __init__(self, setup: Setup, options: Options) -> None:
        self._tokenizer = tokenizer_of(setup)
        if why := architectures.why_not_sharded(config := self._tokenizer.config):
            raise EngineError(why)
        loading.check_weights(setup.model)
        loading.prepare_transformers()
        self._device = process_group.join(setup.world, options.timeout_seconds)
        # NCCL would make the CPU wait for the GPU at every step; these flags are for the CPUs alone.
        self._flags = dist.new_group(backend="gloo", timeout=process_group.collective_timeout(options.timeout_seconds))
        self._offload: PreparedOffload | None = None
        self._gathered_bytes = 0  # that a forward takes for weights
        self._gatherer: LayerGatherer | None = None
        self._whole_model = setup.world.size == 1 and options.offload is None  # in its place on the one rank
        self._by_layers = not options.is_gathered_by_deepspeed and (self._whole_model or are_layers_listed(config))
        try:
            self._model = self._load(setup, options)
        except BaseException:
            self.close()
            raise
        sizing = BatchSizing(
            setup.batch_size,
            local_size=setup.world.local_size,
            limits=setup.limits,
            kept_free=self._gathered_bytes,
            # A step takes as long as the weights need to come over: until computing takes as long, more rows are free.
            most_rows=_MOST_ROWS if options.offload else None,
            reserve=True,
        )
        # A rank waits for its peers in `_agree`, not inside `generate`; there it counts its steps.
        loaded = LoadedModel(self._model, self._tokenizer, self._device, {"synced_gpus": False})
        self._batches: StaticBatches | None = StaticBatches(
            loaded, sizing, self.signs, counts_steps=False, check=setup.selftest
        )
        self.signs.timeout_seconds, self._idle = options.timeout_seconds, False
        self._stop: Callable[[], bool] = lambda: False
        self._model.register_forward_pre_hook(self._before_forward, prepend=True)
        if not (self._whole_model and self._by_layers):  # there it only makes the batch smaller
            # Warning: the forward of a model of Transformers is replaced. Without this a rank that runs out of memory
            # in the middle of a forward would make its batch smaller, and the others would wait for it until they
            # time out. `model.generate` calls `self(...)`, which finds `forward` on the object first; a version that
            # calls the class's forward would pass this by.
            self._model.forward = raise_out_of_step(self._model.forward)

    def generate(self, prompts: Iterator[Prompt], stop: Callable[[], bool]) -> Iterator[Batch]:
        if self._batches is None:
            raise EngineError("this engine is closed")
        self._stop = stop
        try:
            # Never by the local answer alone: `_before_forward` ends all ranks at the same forward.
            begin, steps = time.perf_counter(), self.signs.steps
            for batch in self._batches.run(prompts, lambda: False):
                yield self._add_share_of_bound(batch, time.perf_counter() - begin, self.signs.steps - steps)
                begin, steps = time.perf_counter(), self.signs.steps
            while self._agree(works=False):
                self._forward_idle()
        except _Stopped:
            return

    def _add_share_of_bound(self, batch: Batch, seconds: float, steps: int) -> Batch:
        """Returns `batch`, which took this many seconds and steps, with how near to its bound an offload came."""
        path = self._offload
        if path is None or path.bandwidth is None or not steps:
            return batch
        share = bandwidth.compute_share_of_bound(seconds / steps, path.weight_bytes, path.bandwidth)
        return replace(batch, share_of_bound=round(share, 3))

    def abandon(self) -> None:
        process_group.abandon()

    def close(self) -> None:
        if self._gatherer is not None:
            self._gatherer.close()
        self._batches = self._model = self._gatherer = None
        device.release()
        process_group.leave()
        if self._offload is not None:
            self._offload.close()

    def _load(self, setup: Setup, options: Options) -> Any:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        dtype = loading.floating_dtype(setup.dtype, self._tokenizer.config)
        config = self._make_configuration(setup, options, dtype)
        # Transformers holds it by weak reference, and shards a model as it loads only while it is alive.
        _alive = HfDeepSpeedConfig(config)  # type: ignore[no-untyped-call]
        arguments = {"dtype": dtype, "attn_implementation": options.attn_implementation}
        model = loading.load(setup.model, arguments, adapter=setup.adapter)
        layers = find_layers(model)
        if self._by_layers and (layers or self._whole_model):
            host, pinned = options.offload is not None, options.pin_memory
            self._gatherer = LayerGatherer(model, layers, self._device, host=host, pinned=pinned)
            self._gathered_bytes = 0  # its buffers are there already
            return model
        if options.whole_layers and layers:
            deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
        engine = deepspeed.initialize(model=model, config=config)[0]
        deepspeed_config.remove_backward_hooks(engine)
        return engine.module.eval()

    def _make_configuration(self, setup: Setup, options: Options, dtype: torch.dtype) -> dict[str, Any]:
        """Returns DeepSpeed's configuration: sizes for this model, the user's settings, the user's file over all."""
        weights = list_parameters(self._tokenizer.config, dtype)
        sections: dict[str, Any] = {}
        if options.weight_bits is not None:
            bits: Literal[4, 8] = 4 if options.weight_bits == 4 else 8
            check_quantization(Path(setup.model), weights, bits, options.weight_group)
            sections["weight_quantization"] = make_quantization_section(bits, options.weight_group)
            weights = plan_quantized(weights, bits, options.weight_group)
        self._gathered_bytes = 0 if self._whole_model else deepspeed_config.estimate_gathered_bytes(weights)
        hidden = self._tokenizer.config.get_text_config().hidden_size
        layers, whole = options.whole_layers, self._whole_model
        sizes = deepspeed_config.make_bucket_sizes(weights, hidden, whole_layers=layers, whole_model=whole)
        given = {name: getattr(options, name.removeprefix("stage3_")) for name in sizes}
        sizes |= {name: size for name, size in given.items() if size is not None}
        config = deepspeed_config.make_configuration(setup.world.size, dtype, sizes) | sections
        if options.offload is not None:
            self._offload = offload = self._prepare_offload(setup, options, weights)
            if setup.world.rank == 0:
                offload.log_bound()
            config["zero_optimization"]["offload_param"] = offload.plan.offload_param
            config |= {"aio": offload.plan.aio} if offload.plan.aio else {}
        if options.config is not None:
            config = deepspeed_config.merge(config, deepspeed_config.read_user_configuration(options.config))
        # An autograd function in place of every matrix product, a quarter of a small step; it reads quantised weights.
        config["zero_optimization"]["memory_efficient_linear"] = "weight_quantization" in config
        return config

    def _prepare_offload(self, setup: Setup, options: Options, weights: Parameters) -> PreparedOffload:
        kind, _, folder = (options.offload or "").partition("=")
        if kind == "cpu":
            return prepare_cpu(
                weights, setup.world, self._device, pin_memory=options.pin_memory, by_layers=self._by_layers
            )
        settings = NvmeSettings(
            pin_memory=options.pin_memory and torch.cuda.is_available(),
            whole_layers=options.whole_layers,
            lockable_bytes=checks.read_lockable_bytes(),
        )
        return prepare_nvme(weights, setup, Path(folder), settings, self._flags)

    def _before_forward(self, module: Any, arguments: Any) -> None:
        if not self._idle:
            self._agree(works=True)

    def _agree(self, works: bool) -> bool:
        """Returns whether any rank has work, as all ranks see it before the forward that they are about to make.

        Raises:
            _Stopped: one of them has been asked to stop: none makes that forward.
        """
        flags = torch.tensor([int(works), int(self._stop())])
        dist.all_reduce(flags, group=self._flags)
        self.signs.steps += 1
        if flags[1]:
            raise _Stopped
        return bool(flags[0])

    def _forward_idle(self) -> None:
        token = torch.tensor([[self._tokenizer.pad_token]], device=self._device)
        self._idle = True
        try:
            with torch.inference_mode():
                self._model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
        finally:
            self._idle = False
