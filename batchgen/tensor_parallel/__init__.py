"""One model over the ranks of a group, each with a share of every matrix: DeepSpeed's AutoTP over mapped files.

`ranks_of_group` and `check_split` say before any weight what can be split; `mapped`, `split` and `bring` give a rank
its share of an ordinary model, of which it reads nothing else; `make` and `read` keep shares in files of their own.
"""

from __future__ import annotations

from batchgen.tensor_parallel.autotp import check_split, most_ranks, placements, split
from batchgen.tensor_parallel.group import Group, ranks_of_group, stream_of
from batchgen.tensor_parallel.layers import plain
from batchgen.tensor_parallel.share import load
from batchgen.tensor_parallel.split_files import make, read
from batchgen.tensor_parallel.weights import bring, mapped

__all__ = [
    "Group",
    "bring",
    "check_split",
    "load",
    "make",
    "mapped",
    "most_ranks",
    "placements",
    "plain",
    "ranks_of_group",
    "read",
    "split",
    "stream_of",
]
