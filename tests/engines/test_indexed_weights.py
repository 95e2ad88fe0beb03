"""Weights in files that an index names, wherever below the model's folder they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from batchgen.engine import Setup
from batchgen.engines import find
from batchgen.engines.ds_zero.quantization import _read_saved_types
from batchgen.models import check_there
from batchgen.models.definition.errors import ModelError
from batchgen.tensor_parallel.stored_dtype import find_stored_dtype
from batchgen.world import World
from tests.tiny_models import random_prompts


def generate(name: str, model: Path) -> dict[str, str | None]:
    kind = find(name)
    with kind(Setup(str(model), "auto", 4, World()), kind.Options()) as engine:
        return {
            g.id: g.text for batch in engine.generate(iter(random_prompts(4)), lambda: False) for g in batch.generations
        }


@pytest.mark.parametrize("name", ["accelerate", "paged"])
def test_an_index_may_name_files_in_a_folder_below(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "parts").mkdir()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "parts" / "all.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "parts/all.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_there(str(folder))
    assert generate(name, folder) == generate(name, tiny_llama)
    assert find_stored_dtype(folder) == torch.float32
    assert _read_saved_types(folder) == {"F32"}
    (folder / "parts" / "all.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of its 1 weight files are missing \(parts/all\.safetensors\)"):
        generate(name, folder)
