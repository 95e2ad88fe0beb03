"""What the ranks of a group do together, as operators: opaque to a compiler, and recorded by CUDA graphs."""

from __future__ import annotations

import torch
import torch.distributed as dist

_groups: dict[str, dist.ProcessGroup] = {}  # by name: an operator takes no group


def register_group(group: dist.ProcessGroup) -> str:
    """Returns the name by which the operators find `group`."""
    _groups[group.group_name] = group
    return group.group_name


def sum_over_ranks(values: torch.Tensor, group: str) -> None:
    """Adds up the values of all ranks, in place.

    Args:
        group: its name, as `register_group` returned it.
    """
    torch.ops.batchgen.sum_over_ranks(values, group)


def _sum_over_ranks(values: torch.Tensor, group: str) -> None:
    """The operator's implementation."""
    dist.all_reduce(values, group=_groups[group])


_library = torch.library.Library("batchgen", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("sum_over_ranks(Tensor(a!) values, str group) -> ()")  # type: ignore[no-untyped-call]
_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("batchgen::sum_over_ranks", lambda values, group: None, lib=_library)
