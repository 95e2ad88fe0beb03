"""LoRA adapters: read from their folders, compared with the model, and merged into its weights as these are loaded.

An adapter is what peft's `save_pretrained` writes: `adapter_config.json` and the tensors. For each weight it has two
small matrices, whose product is added (https://arxiv.org/abs/2106.09685, section 4.1), or a new value. A merged model
computes as the original does, so that no engine knows that there was an adapter. Where rows name one of several,
weights stay as they are, and the engine adds the products (`by_row`).

peft itself is not used: it works on a model that is loaded whole and not quantised, and adds layers to it before it
merges them, whereas a weight that is sharded, quantised or kept on a disk has to be changed before that happens to it.
The tests compare with peft.
"""

from __future__ import annotations

from batchgen.models.lora.adapter import Adapter, describe, read_adapter
from batchgen.models.lora.by_row import RowAdapters, check_row_adapters, read_row_adapters
from batchgen.models.lora.change import Change
from batchgen.models.lora.check import check_adapter, place_by_config
from batchgen.models.lora.conversions import Wanted, all_changes, merged_on_load
from batchgen.models.lora.places import Places, find_places

__all__ = [
    "Adapter",
    "Change",
    "Places",
    "RowAdapters",
    "Wanted",
    "all_changes",
    "check_adapter",
    "check_row_adapters",
    "describe",
    "find_places",
    "merged_on_load",
    "place_by_config",
    "read_adapter",
    "read_row_adapters",
]
