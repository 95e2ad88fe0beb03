"""Weights that are sharded over ranks, or wait in host memory, come together a layer at a time for its forward.

A rank's shard of a layer is one flat tensor, and so is the layer once it has been gathered: its parameters are views of
that. So a layer costs one collective and one copy, whatever it is made of. DeepSpeed's own coordinator gathers each
parameter by itself, in Python: that way BLOOM-7b1's step over two GPUs took 110 to 120 ms; the weights need 25.

While a layer computes, the next two are being gathered; behind the last one the first ones of the next forward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from batchgen.device import is_out_of_memory
from batchgen.engine import EngineError, OutOfStep
from batchgen.engines.ds_zero.decoder_layers import find_ends

_PREFETCHED = 2  # layers that are being gathered while one computes
_ALIGNED = 128  # elements: where a parameter begins in its layer, for the loads of any kernel


class _Unit:
    """A module whose parameters are gathered together and released together."""

    def __init__(self, module: Any, parameters: Sequence[Any], ranks: int, free: deque[torch.Tensor]) -> None:
        self.module, self.parameters = module, parameters
        sizes = [_align(parameter.ds_numel) for parameter in parameters]
        self.begins = [0, *accumulate(sizes)]
        self.shard_size = _align(-(-self.begins[-1] // ranks))  # elements of each rank
        self.free = free  # the free buffers, which it shares with other units
        self.shard = torch.empty(0)
        self.buffer: torch.Tensor | None = None  # where its parameters are, or are being gathered
        self.is_used = False  # its forward is under way
        self.work: Any = None  # that gathers it
        self.place = -1  # in the order of a forward
        self.views: dict[int, list[torch.Tensor]] = {}  # by `make_views`, by the buffer's address

    def make_views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Returns its parameters as views of `buffer`, which holds the whole unit."""
        begins = zip(self.parameters, self.begins, strict=False)
        return [buffer[begin : begin + part.ds_numel].view(part.ds_shape) for part, begin in begins]


def _align(elements: int) -> int:
    return -(-elements // _ALIGNED) * _ALIGNED


class LayerGatherer:
    """Gathers the weights of a model that `deepspeed.zero.Init` has sharded. All ranks make each forward together.

    Parameters outside the layers stay whole on every rank: norms, and a tied embedding, which a step needs from its
    beginning to its end. So do those of another type than the model's, or of several layers at once. Embedding and
    output matrix take turns in one buffer where they are two. One rank alone without `host` has all of it in its place.

    Args:
        layers: the decoder layers (`decoder_layers.find_layers`).
        device: where they compute.
        host: the shards wait in host memory, `pinned` or not; otherwise on the device.

    Attributes:
        elements: the number of weights that this rank holds between two forwards.

    Raises:
        EngineError: the host memory cannot be pinned.
    """

    def __init__(
        self, model: Any, layers: Sequence[Any], device: torch.device, *, host: bool = False, pinned: bool = False
    ) -> None:
        self._device, self._ranks, self._rank = device, dist.get_world_size(), dist.get_rank()
        self._empty = torch.empty(0, dtype=model.dtype, device=device)
        self._copy_stream: Any = None  # where shards wait in the memory of another device
        if host and device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._order: list[_Unit] = []
        self._is_order_complete = False  # after the first forward
        self._units: list[_Unit] = []
        self._hooks: list[Any] = []
        ends = find_ends(model)
        if self._ranks == 1 and not host:
            layers, ends = [], []
        owners = Counter(parameter for module in (*layers, *ends) for parameter in set(module.parameters()))
        for modules, buffers in ((layers, _PREFETCHED + 1), (ends, 1)):
            free: deque[torch.Tensor] = deque()
            units = []
            for module in modules:
                own = [p for p in module.parameters() if owners[p] == 1 and p.ds_tensor.dtype == model.dtype]
                units.append(_Unit(module, list(dict.fromkeys(own)), self._ranks, free))
            self._units += units
            size = max((unit.shard_size for unit in units), default=0) * self._ranks
            free += [torch.empty(size, dtype=model.dtype, device=device) for _ in range(min(buffers, len(units)))]
        self._keep_whole(model)
        block = None
        if self._copy_stream is not None:
            block = torch.empty(sum(unit.shard_size for unit in self._units), dtype=model.dtype)
        begin = 0
        for unit in self._units:
            self._take_over(unit, None if block is None else block[begin : begin + unit.shard_size])
            begin += unit.shard_size
        self._pinned = _pin(block) if block is not None and pinned else None

    def close(self) -> None:
        """Lets go of everything; the model is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        with suppress(RuntimeError):  # another rank is gone, or the GPU has failed
            for unit in self._units:
                self._wait(unit)
            if self._pinned is not None:
                torch.cuda.synchronize(self._device)
                _cuda_runtime().cudaHostUnregister(self._pinned.data_ptr())
        for unit in self._units:
            unit.buffer = None
            unit.free.clear()
            unit.views.clear()
        self._pinned = None
        self._units, self._order = [], []

    # Warning: the parameters of a model of Transformers, and DeepSpeed's shards of them (`ds_tensor`), are exchanged
    # here, and again at each forward. A parameter's `data` is a view of a buffer while its layer computes, and empty at
    # all other times; DeepSpeed's shards are empty for good. So DeepSpeed's own hooks must not be on such a model
    # (`deepspeed.initialize` is not called), nothing may keep a reference to a parameter's `data`, and a module that is
    # called outside its layer fails. If a new version of DeepSpeed names `ds_tensor`, `ds_numel` or `ds_shape` in
    # another way, or fills its shards up in another order, this breaks, the last of them without an error:
    # tests/engines/ds_zero/test_ds_zero.py compares the text.

    def _keep_whole(self, model: Any) -> None:
        """Gathers, for good, the parameters that are in no unit; moves all buffers to the device."""
        in_units = {id(parameter) for unit in self._units for parameter in unit.parameters}
        self.elements = sum(unit.shard_size for unit in self._units)
        for parameter in model.parameters():
            if id(parameter) not in in_units:
                parameter.data = self._gather_parameter(parameter)
                parameter.ds_tensor.data = self._empty
                self.elements += parameter.numel()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self._device)

    def _take_over(self, unit: _Unit, place: torch.Tensor | None) -> None:
        """Makes this rank's shard of the unit out of DeepSpeed's shards, which end.

        Args:
            place: where it is to lie in host memory, [shard size]; None: in a tensor of its own on the device.
        """
        flat = torch.zeros(unit.shard_size * self._ranks, dtype=self._empty.dtype, device=self._device)
        for parameter, view in zip(unit.parameters, unit.make_views(flat), strict=True):
            view.copy_(self._gather_parameter(parameter))
            parameter.ds_tensor.data = parameter.data = self._empty
        shard = flat[self._rank * unit.shard_size :][: unit.shard_size]
        unit.shard = shard.clone() if place is None else place.copy_(shard)
        self._hooks.append(unit.module.register_forward_pre_hook(partial(self._enter, unit)))
        self._hooks.append(unit.module.register_forward_hook(partial(self._leave, unit)))

    def _gather_parameter(self, parameter: Any) -> torch.Tensor:
        """Returns a whole parameter, out of DeepSpeed's shards of it, which are filled up to equal sizes."""
        shard: torch.Tensor = parameter.ds_tensor.data.to(self._device)
        if self._ranks == 1:
            return shard.view(parameter.ds_shape)
        whole = torch.empty(shard.numel() * self._ranks, dtype=shard.dtype, device=self._device)
        dist.all_gather_into_tensor(whole, shard)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def _enter(self, unit: _Unit, *_: object) -> None:
        if not self._is_order_complete:
            self._is_order_complete = unit.place == 0
            if unit.place < 0:
                unit.place = len(self._order)
                self._order.append(unit)
        if unit.buffer is None:
            self._start_gather(unit, unit.free.popleft() if unit.free else self._take_back(unit.free))
        assert unit.buffer is not None
        self._wait(unit)
        views = unit.views.get(unit.buffer.data_ptr())
        if views is None:
            views = unit.views[unit.buffer.data_ptr()] = unit.make_views(unit.buffer)
        for parameter, view in zip(unit.parameters, views, strict=True):
            parameter.data = view
        unit.is_used = True
        self._prefetch(unit)

    def _leave(self, unit: _Unit, *_: object) -> None:
        assert unit.buffer is not None
        for parameter in unit.parameters:
            parameter.data = self._empty  # whoever reads it now is to fail, and not to read another layer's
        unit.is_used = False
        unit.free.append(unit.buffer)
        unit.buffer = None
        self._prefetch(unit)

    def _prefetch(self, unit: _Unit) -> None:
        """Starts to gather the units behind this one, as far as buffers are free; in the same order on every rank."""
        if not self._is_order_complete:
            return
        for step in range(1, _PREFETCHED + 1):
            following = self._order[(unit.place + step) % len(self._order)]
            if following.buffer is None:
                if not following.free:
                    return
                self._start_gather(following, following.free.popleft())

    def _take_back(self, free: deque[torch.Tensor]) -> torch.Tensor:
        """Returns the buffer of a unit that was gathered in vain: this forward takes another way than the first."""
        gathered = (unit for unit in self._units if unit.free is free and unit.buffer is not None)
        unused = next(unit for unit in gathered if not unit.is_used)
        self._wait(unused)
        buffer, unused.buffer = unused.buffer, None
        assert buffer is not None
        return buffer

    def _start_gather(self, unit: _Unit, buffer: torch.Tensor) -> None:
        """Starts to gather `unit` into `buffer`, behind all that the device has been given to do before."""
        unit.buffer = buffer
        whole, shard = buffer[: unit.shard_size * self._ranks], unit.shard
        if self._copy_stream is None:
            unit.work = self._all_gather(whole, shard)
            return
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            place = whole[self._rank * unit.shard_size :][: unit.shard_size]
            place.copy_(shard, non_blocking=True)
            unit.work = self._all_gather(whole, place)

    def _all_gather(self, whole: torch.Tensor, shard: torch.Tensor) -> Any:
        if self._ranks > 1:
            return dist.all_gather_into_tensor(whole, shard, async_op=True)
        if self._copy_stream is not None:
            return self._copy_stream.record_event()
        whole.copy_(shard)
        return None

    def _wait(self, unit: _Unit) -> None:
        """Waits until `unit` is gathered; on a GPU the stream waits, not the CPU.

        An event and NCCL's work have a method of the same name for that.
        """
        work, unit.work = unit.work, None
        if work is not None:
            work.wait()


def raise_out_of_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `forward` such that it raises OutOfStep where it runs out of memory.

    Ranks that gather weights for each other cannot agree on a failure in the middle of a forward.
    """

    @wraps(forward)
    def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            return forward(*arguments, **named)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfStep("out of memory inside a forward that the ranks make together") from error
            raise

    return guarded


def _pin(block: torch.Tensor) -> torch.Tensor:
    """Pins the memory of `block` by hand, since PyTorch rounds pinned memory up to a power of two."""
    try:
        torch.cuda.check_error(_cuda_runtime().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    except RuntimeError as error:
        raise EngineError(
            f"{block.nbytes / 1e9:.1f} GB of host memory cannot be pinned ({error}); --set pin_memory=false does "
            "without, at half the speed or less"
        ) from error
    return block


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
