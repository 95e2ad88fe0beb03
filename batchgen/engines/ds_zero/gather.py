"""Weights that are sharded over ranks, or wait in host memory, come together a layer at a time for its forward.

A rank's share of a layer is one flat piece, and so is the layer once it has come: its parameters are views of that. So
a layer costs one collective and one copy, whatever it is made of. DeepSpeed's own coordinator brings each parameter by
itself, in Python: BLOOM-7b1's step over two GPUs took 110 to 120 ms that way, of which the weights need 25.

While a layer computes, the next two are on their way; behind the last one the first ones of the next forward.
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
from batchgen.models import architectures

_AHEAD = 2  # layers on their way while one computes
_ALIGNED = 128  # elements: where a parameter begins in its layer, for the loads of any kernel


def lists_layers(config: Any) -> bool:
    """Whether Transformers lists the classes of the decoder layers of models with this config."""
    return bool(getattr(architectures.model_class(config), "_no_split_modules", None))


def layers(model: Any) -> list[Any]:
    """The model's decoder layers: of the classes that Transformers lists as what must not be split, the outermost."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[Any] = []

    def search(module: Any) -> None:
        if type(module).__name__ in names:
            found.append(module)
        else:
            for child in module.children():
                search(child)

    search(model)
    return found


class _Unit:
    """A module whose parameters come and go together."""

    def __init__(self, module: Any, parameters: Sequence[Any], ranks: int, room: deque[torch.Tensor]) -> None:
        self.module, self.parameters = module, parameters
        sizes = [_aligned(one.ds_numel) for one in parameters]
        self.begins = [0, *accumulate(sizes)]
        self.part = _aligned(-(-self.begins[-1] // ranks))  # elements of a rank's share
        self.room = room  # that it shares with others: the buffers that are free
        self.share = torch.empty(0)
        self.buffer: torch.Tensor | None = None  # where it is, or will be once it has come
        self.used = False  # its forward is under way
        self.work: Any = None  # that brings it
        self.place = -1  # in the order of a forward
        self.views: dict[int, list[torch.Tensor]] = {}  # of `views_in`, by the buffer's address

    def views_in(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Its parameters where the whole lies in `buffer`."""
        begins = zip(self.parameters, self.begins, strict=False)
        return [buffer[begin : begin + one.ds_numel].view(one.ds_shape) for one, begin in begins]


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNED) * _ALIGNED


class Gathered:
    """The weights of a model that `deepspeed.zero.Init` has sharded. All ranks make each forward at the same time.

    Parameters outside the layers stay whole on every rank: norms, and a tied embedding, which a step needs from its
    beginning to its end. So do those of another type than the model's, or of several layers at once. Embedding and
    output matrix take turns in one buffer where they are two. One rank alone without `host` has all of it in its place.

    Args:
        layers: the decoder layers.
        device: where they compute.
        host: the shares wait in host memory, `pinned` or not; otherwise on the device.

    Attributes:
        elements: of the weights, that this rank holds between two forwards.

    Raises:
        EngineError: the host memory cannot be pinned.
    """

    def __init__(
        self, model: Any, layers: Sequence[Any], device: torch.device, *, host: bool = False, pinned: bool = False
    ) -> None:
        self._device, self._ranks, self._rank = device, dist.get_world_size(), dist.get_rank()
        self._nothing = torch.empty(0, dtype=model.dtype, device=device)
        self._copies: Any = None  # a stream, where shares wait in the memory of another device
        if host and device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._order: list[_Unit] = []
        self._known = False  # the order, after the first forward
        self._units: list[_Unit] = []
        self._hooks: list[Any] = []
        ends = _ends(model)
        if self._ranks == 1 and not host:
            layers, ends = [], []
        owners = Counter(one for module in (*layers, *ends) for one in set(module.parameters()))
        for modules, buffers in ((layers, _AHEAD + 1), (ends, 1)):
            room: deque[torch.Tensor] = deque()
            units = []
            for module in modules:
                own = [one for one in module.parameters() if owners[one] == 1 and one.ds_tensor.dtype == model.dtype]
                units.append(_Unit(module, list(dict.fromkeys(own)), self._ranks, room))
            self._units += units
            most = max((unit.part for unit in units), default=0) * self._ranks
            room += [torch.empty(most, dtype=model.dtype, device=device) for _ in range(min(buffers, len(units)))]
        shared = {id(one) for unit in self._units for one in unit.parameters}
        self.elements = sum(unit.part for unit in self._units)
        for one in model.parameters():
            if id(one) not in shared:
                one.data = self._whole(one)
                one.ds_tensor.data = self._nothing
                self.elements += one.numel()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        block = None
        if self._copies is not None:
            block = torch.empty(sum(unit.part for unit in self._units), dtype=model.dtype)
        begin = 0
        for unit in self._units:
            self._take(unit, None if block is None else block[begin : begin + unit.part])
            begin += unit.part
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
                _runtime().cudaHostUnregister(self._pinned.data_ptr())
        for unit in self._units:
            unit.buffer = None
            unit.room.clear()
            unit.views.clear()
        self._pinned = None
        self._units, self._order = [], []

    def _take(self, unit: _Unit, place: torch.Tensor | None) -> None:
        """This rank's share from DeepSpeed's shards, which end, into `place` in host memory, or a place of its own."""
        flat = torch.zeros(unit.part * self._ranks, dtype=self._nothing.dtype, device=self._device)
        for one, view in zip(unit.parameters, unit.views_in(flat), strict=True):
            view.copy_(self._whole(one))
            one.ds_tensor.data = one.data = self._nothing
        share = flat[self._rank * unit.part :][: unit.part]
        unit.share = share.clone() if place is None else place.copy_(share)
        self._hooks.append(unit.module.register_forward_pre_hook(partial(self._enter, unit)))
        self._hooks.append(unit.module.register_forward_hook(partial(self._leave, unit)))

    def _whole(self, parameter: Any) -> torch.Tensor:
        """A parameter from DeepSpeed's shards of it, which are filled up to equal sizes."""
        shard: torch.Tensor = parameter.ds_tensor.data.to(self._device)
        if self._ranks == 1:
            return shard.view(parameter.ds_shape)
        whole = torch.empty(shard.numel() * self._ranks, dtype=shard.dtype, device=self._device)
        dist.all_gather_into_tensor(whole, shard)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def _enter(self, unit: _Unit, *_: object) -> None:
        if not self._known:
            self._known = unit.place == 0
            if unit.place < 0:
                unit.place = len(self._order)
                self._order.append(unit)
        if unit.buffer is None:
            self._bring(unit, unit.room.popleft() if unit.room else self._taken_back(unit.room))
        assert unit.buffer is not None
        self._wait(unit)
        views = unit.views.get(unit.buffer.data_ptr())
        if views is None:
            views = unit.views[unit.buffer.data_ptr()] = unit.views_in(unit.buffer)
        for one, view in zip(unit.parameters, views, strict=True):
            one.data = view
        unit.used = True
        self._bring_ahead(unit)

    def _leave(self, unit: _Unit, *_: object) -> None:
        assert unit.buffer is not None
        for one in unit.parameters:
            one.data = self._nothing  # whoever reads it now is to fail, and not to read another layer's
        unit.used = False
        unit.room.append(unit.buffer)
        unit.buffer = None
        self._bring_ahead(unit)

    def _bring_ahead(self, unit: _Unit) -> None:
        """Those that come next, as far as there is room; in the same order on every rank."""
        if not self._known:
            return
        for step in range(1, _AHEAD + 1):
            following = self._order[(unit.place + step) % len(self._order)]
            if following.buffer is None:
                if not following.room:
                    return
                self._bring(following, following.room.popleft())

    def _taken_back(self, room: deque[torch.Tensor]) -> torch.Tensor:
        """The buffer of one that came in vain: this forward takes another way than the first."""
        vain = next(one for one in self._units if one.room is room and one.buffer is not None and not one.used)
        self._wait(vain)
        buffer, vain.buffer = vain.buffer, None
        assert buffer is not None
        return buffer

    def _bring(self, unit: _Unit, buffer: torch.Tensor) -> None:
        """Puts it on its way; what the device has been given to do before comes before it."""
        unit.buffer = buffer
        whole, share = buffer[: unit.part * self._ranks], unit.share
        if self._copies is None:
            unit.work = self._collect(whole, share)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            place = whole[self._rank * unit.part :][: unit.part]
            place.copy_(share, non_blocking=True)
            unit.work = self._collect(whole, place)

    def _collect(self, whole: torch.Tensor, share: torch.Tensor) -> Any:
        if self._ranks > 1:
            return dist.all_gather_into_tensor(whole, share, async_op=True)
        if self._copies is not None:
            return self._copies.record_event()
        whole.copy_(share)
        return None

    def _wait(self, unit: _Unit) -> None:
        """Until it has come; on a GPU the stream waits, not the CPU. An event and NCCL's work have the same word."""
        work, unit.work = unit.work, None
        if work is not None:
            work.wait()


def _ends(model: Any) -> list[Any]:
    """Embedding and output matrix, where they are two."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(weight) for end in found if (weight := getattr(end, "weight", None)) is not None}
    return found if len(weights) == 2 else []


def fatal_if_out_of_memory(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which raises OutOfStep then: ranks that gather weights for each other cannot agree on a failure in the
    middle of it."""

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
    """By hand: PyTorch rounds pinned memory up to a power of two."""
    try:
        torch.cuda.check_error(_runtime().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    except RuntimeError as error:
        raise EngineError(
            f"{block.nbytes / 1e9:.1f} GB of host memory cannot be pinned ({error}); --set pin_memory=false does "
            "without, at half the speed or less"
        ) from error
    return block


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
