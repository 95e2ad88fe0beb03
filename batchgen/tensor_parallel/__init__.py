"""One model over the ranks of a group, each with a share of every matrix: DeepSpeed's AutoTP over mapped files.

`ranks_of_group` and `check_split` say before any weight is read what can be split. `load_shard` gives a rank its share
of a model: `map_model` maps the files, `split` replaces the layers by those of this rank, and `copy_weights` reads its
share and nothing else. `write_split` and `read_split` keep shares in files of their own.
"""

from __future__ import annotations

from batchgen.tensor_parallel.adapted import LayerCut, find_layer_cuts
from batchgen.tensor_parallel.autotp import check_split, max_ranks, placements, split
from batchgen.tensor_parallel.group import Group, ranks_of_group, stream_of
from batchgen.tensor_parallel.layers import use_plain_layers
from batchgen.tensor_parallel.quantised_files import write_quantised
from batchgen.tensor_parallel.shard import choose_compute_dtype, load_alone, load_shard
from batchgen.tensor_parallel.split_files import read_split, write_split
from batchgen.tensor_parallel.weights import copy_weights, map_model

__all__ = [
    "Group",
    "LayerCut",
    "check_split",
    "choose_compute_dtype",
    "copy_weights",
    "find_layer_cuts",
    "load_alone",
    "load_shard",
    "map_model",
    "max_ranks",
    "placements",
    "ranks_of_group",
    "read_split",
    "split",
    "stream_of",
    "use_plain_layers",
    "write_quantised",
    "write_split",
]
