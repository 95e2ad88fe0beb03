"""What stands for quantised weights while a model is built and cut: address space without memory.

A quantised weight is several tensors, none of which has its shape, and Transformers' loader and AutoTP know one. So
each gets a part of an address space as large as all of them would be in 16 bits, which is never read. Whatever is done
to it that makes a view - a stack of experts, a span of rows for a rank - the view's own address and strides say which
numbers it stands for. What makes no view has another address, which `check_used` finds.
"""

from __future__ import annotations

import bisect
import math
import mmap
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from batchgen.engine import EngineError
from batchgen.models.quantised.packing import split_groups
from batchgen.models.quantised.stored import StoredWeight
from batchgen.models.quantised.weight import QuantisedWeight


@dataclass(frozen=True)
class Part:
    """What a view stands for: a span of rows and a span of columns of a weight, or of some of its experts."""

    stored: StoredWeight
    experts: tuple[int, int] | None
    """First and number; None: the weight has none."""
    rows: tuple[int, int]
    columns: tuple[int, int]
    is_transposed: bool
    """The view is […, columns, rows]."""
    is_stack: bool
    """The view has a dimension of experts."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all rows and columns."""
        return (self.rows[1], self.columns[1]) == self.stored.shape[-2:]

    def list_views(self) -> list[torch.Tensor]:
        """Returns the parts of files that `read` reads."""
        alone = self.experts is not None and self.experts[1] == 1 and self.stored.shape[0] > 1
        return list(self.stored.list_views(self.experts[0] if alone and self.experts else None).values())

    def read(self, device: torch.device) -> QuantisedWeight:
        """Reads it to `device`; a matrix, or one with experts if the weight has them.

        Raises:
            EngineError: columns are cut where that cannot be.
        """
        weight = self._read_experts(device)
        if self.is_whole:
            return weight
        weight = weight.cut_rows(*self.rows)
        if self.columns != (0, self.stored.shape[-1]):
            weight = self._cut_columns(weight)
        return weight.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), also_order=False)

    def _read_experts(self, device: torch.device) -> QuantisedWeight:
        if self.experts is None or self.experts == (0, self.stored.shape[0]):
            return self.stored.read(device)
        first, count = self.experts
        if count == 1:
            one = self.stored.read(device, first)
            return one.map(lambda tensor: tensor[None], also_order=False)
        whole = self.stored.read(device)
        return whole.map(lambda tensor: tensor.narrow(0, first, count).clone(), also_order=False)

    def _cut_columns(self, weight: QuantisedWeight) -> QuantisedWeight:
        begin, length = self.columns
        place = f"{self.stored.name} is to be cut into columns {begin} to {begin + length}"
        if weight.order is not None:
            raise EngineError(
                f"--tp with these weights: {place}, and its columns are in the order of their groups (desc_act of "
                "GPTQ). Leave --tp out, or take the model in another format"
            )
        if weight.scales.shape[-1] > 1:
            size = math.gcd(weight.group, begin, length)
            if size < 16:
                raise EngineError(
                    f"--tp with these weights: {place}, which do not begin and end near its groups of {weight.group}. "
                    "Use another number of ranks, or leave --tp out"
                )
            if size != weight.group:
                weight = split_groups(weight, weight.group, size)
        cut = weight.cut_columns(begin, length)
        if cut.inputs_group and (begin % cut.inputs_group or length % cut.inputs_group):
            raise EngineError(
                f"--tp with these weights: {place}, and each {cut.inputs_group} inputs are rounded together. Use "
                "another number of ranks, or leave --tp out"
            )
        return cut


class Placeholders:
    """The address space of some quantised weights.

    Args:
        weights: which.
        dtype: that their placeholders have: that of the model, so that Transformers does not convert them.
    """

    def __init__(self, weights: Iterable[StoredWeight], dtype: torch.dtype) -> None:
        self.weights = list(weights)
        sizes = [math.prod(weight.shape) for weight in self.weights]
        with warnings.catch_warnings():  # torch warns that it must not be written to, and it is not
            warnings.simplefilter("ignore")
            # Read-only, the system need not be able to give it memory.
            size = max(1, sum(sizes)) * dtype.itemsize
            self._space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
            numbers = torch.frombuffer(self._space, dtype=dtype)
        self._tensors: dict[str, torch.Tensor] = {}
        self._begins: list[int] = []
        self._taken: set[str] = set()
        self._lock = threading.Lock()
        first = 0
        for weight, size in zip(self.weights, sizes, strict=True):
            tensor = numbers[first : first + size].view(weight.shape)
            self._begins.append(tensor.data_ptr())
            self._tensors[weight.name] = tensor
            first += size
        self._end = numbers.data_ptr() + first * dtype.itemsize

    def take(self, weight: StoredWeight) -> torch.Tensor:
        """Returns what stands for a weight, in the shape of its parameter, and notes that it was asked for."""
        next(iter(weight.parts.values())).view()  # from now on its file is mapped, which `copy_weights` looks for
        with self._lock:
            self._taken.add(weight.name)
        tensor = self._tensors[weight.name]
        return tensor.transpose(-1, -2) if weight.is_transposed else tensor

    def find(self, view: torch.Tensor) -> Part | None:
        """Returns what `view` stands for; None: it is no view of a placeholder."""
        if not self._begins or view.numel() == 0 or not self._begins[0] <= view.data_ptr() < self._end:
            return None
        stored = self.weights[bisect.bisect_right(self._begins, view.data_ptr()) - 1]
        first = (view.data_ptr() - self._tensors[stored.name].data_ptr()) // view.element_size()
        *_, height, width = stored.shape
        expert, within = divmod(first, height * width)
        row, column = divmod(within, width)
        experts = (expert, 1) if len(stored.shape) == 3 else None
        if view.dim() == 3:
            experts = (expert, view.shape[0])
        steps = [step if size > 1 else 0 for size, step in zip(view.shape[-2:], view.stride()[-2:], strict=True)]
        if view.dim() not in (2, 3) or sorted(steps) not in ([1, width], [0, 1], [0, width], [0, 0]):
            raise EngineError(
                f"the quantised weight {stored.name} is to be taken apart in a way that is not known here; use "
                "--engine accelerate, or the model in another precision"
            )
        is_transposed = steps[0] == 1 or steps[1] == width
        rows, columns = reversed(view.shape[-2:]) if is_transposed else view.shape[-2:]
        return Part(stored, experts, (row, rows), (column, columns), is_transposed, view.dim() == 3)

    def check_used(self, views: Iterable[torch.Tensor]) -> None:
        """Checks that what a model holds, `views`, covers each placeholder that its loader has taken.

        Raises:
            EngineError: one is not covered: the loader has changed it as no view can be.
        """
        seen = dict.fromkeys(self._taken, 0)
        for view in views:
            part = self.find(view)
            if part is not None and part.stored.name in seen:
                seen[part.stored.name] += view.numel()
        for weight in self.weights:
            if seen.get(weight.name, math.prod(weight.shape)) != math.prod(weight.shape):
                raise EngineError(
                    f"Transformers changes {weight.name} as it loads it, which cannot be done to a quantised weight; "
                    "use --engine accelerate, or the model in another precision"
                )
