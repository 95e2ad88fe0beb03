"""Models of a shape: as large as the real ones, and hollow files that every engine takes for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchgen.engine import Setup
from batchgen.engines.accelerate import Accelerate
from batchgen.models import ModelError, random_weights, shapes
from batchgen.models.footprint import CacheFormat, cache_bytes_per_token
from batchgen.models.parameters import list_parameters
from batchgen.world import World

ROOT = Path(__file__).parents[2]

# Parameters as the hub counts them.
PARAMETERS = {
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gemma3-12b": 11_766_034_176,  # without what it sees with
    "deepseek-v2-lite": 15_706_484_224,
}

# Those of mixtures that one token is computed with: of every matrix of an expert, as many as the token is sent to.
ACTIVE = {
    "qwen3-30b-a3b": 30_532_122_624 - 48 * (128 - 8) * 3 * 2048 * 768,
    "mixtral-8x7b": 46_702_792_704 - 32 * (8 - 2) * 3 * 4096 * 14_336,
    "gpt-oss-20b": 20_914_757_184 - 24 * (32 - 4) * (3 * 2880 * 2880 + 3 * 2880),
    "deepseek-v2-lite": 15_706_484_224 - 26 * (64 - 6) * 3 * 2048 * 1408,
}

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_shape_has_the_parameters_of_the_real_model_and_takes_no_room(name: str, tmp_path: Path) -> None:
    folder = shapes.make(name, torch.bfloat16, tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * PARAMETERS[name]
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 20 << 20
    assert shapes.SHAPES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_active_parameters_of_a_shape_leave_out_experts_that_a_token_is_not_sent_to(name: str) -> None:
    weights = list_parameters(shapes.config_of(name), torch.bfloat16)
    assert (weights.total, weights.active) == (PARAMETERS[name], ACTIVE.get(name, PARAMETERS[name]))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_manual_has_the_sizes_of_each_shape(name: str) -> None:
    page = (ROOT / "docs" / "bench-and-plan.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    _, _, parameters, active, cache, _ = (cell.strip() for cell in line.split("|"))
    decimals = len(parameters.partition(".")[2].removesuffix(" B"))
    assert parameters == f"{PARAMETERS[name] / 1e9:.{decimals}f} B"
    assert active == (f"{ACTIVE[name] / 1e9:.1f} B" if name in ACTIVE else "")
    in_16_bits = cache_bytes_per_token(shapes.config_of(name), CacheFormat(2))
    assert cache.removesuffix(" bytes").partition(";")[0] == f"{in_16_bits:,}"


def test_a_shape_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no shape gpt-5: name a config.json, or one of bloom-560m, .*"):
        shapes.config_of("gpt-5")
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ModelError, match="does not know model_type 'no such'"):
        shapes.config_of(str(tmp_path))
    for look in (shapes.config_of, shapes.find):
        with pytest.raises(ModelError, match=r"cannot read nnn.*: File name too long"):
            look("n" * 300)


# In a process of its own: DeepSpeed changes torch and Transformers for good.
FILLED = """
import sys
from pathlib import Path
from batchgen.engine import Setup
from batchgen.engines import find, parse_options
from batchgen.types import Prompt, SamplingParams
from batchgen.world import World
name, *folders = sys.argv[1:]
kind = find(name)
prompts = [Prompt(n, str(n), n + 1, "", [n + 1], SamplingParams(max_new_tokens=6), {}) for n in range(8)]
for folder in folders:
    setup = Setup(folder, "float32", 8, World(), run=folder, cache=folder)
    with kind(setup, parse_options(kind, [])) as engine:
        batches = list(engine.generate(iter(prompts), lambda: False))
    # Zeros would say the same after every prompt; of random numbers, drawn anew in each process, two may say the same.
    texts = len({generation.text for batch in batches for generation in batch.generations})
    print(folder, "different texts" if texts >= 5 else f"{texts} texts")
"""

# The shapes of other families, made small: what is not here is as in `SHAPES`.
_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rope_scaling": None,
}
_EXPERTS = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_WINDOW = {"intermediate_size": 32, "head_dim": 16, "sliding_window": 4}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
FAMILIES = {
    "qwen3-30b-a3b": {**_SMALL, **_EXPERTS, "num_experts": 8, "head_dim": 16},
    "mixtral-8x7b": {**_SMALL, "intermediate_size": 32},
    "gpt-oss-20b": {**_SMALL, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3-12b": {**_SMALL, **_WINDOW, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "deepseek-v2-lite": {**_SMALL, **_EXPERTS, **_LATENT, "n_routed_experts": 8, "v_head_dim": 16},
}


@pytest.mark.parametrize("name", ["accelerate", "ds-inference", "ds-zero"])
def test_engines_fill_a_hollow_model_with_numbers_that_mean_something(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    folder = shapes.make(str(tmp_path / "config.json"), torch.float32, tmp_path / "model")
    assert random_weights.hollow(folder) == 0.3
    words = [sys.executable, "-c", FILLED, name, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{folder} different texts"


def test_each_family_of_the_shapes_is_filled_under_the_names_that_its_model_has(tmp_path: Path) -> None:
    folders = {}
    for shape, small in FAMILIES.items():
        (tmp_path / shape).mkdir()
        path = tmp_path / shape / "config.json"
        path.write_text(json.dumps({**shapes.SHAPES[shape], **small}))
        folders[shape] = shapes.make(str(path), torch.float32, tmp_path / shape / "model")
    words = [sys.executable, "-c", FILLED, "accelerate", *map(str, folders.values())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-5:] == [f"{folder} different texts" for folder in folders.values()]


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_rounded_weights_of_a_hollow_model_are_filled_too(dtype: str, tmp_path: Path) -> None:
    rounding = pytest.importorskip("bitsandbytes.functional")
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "intermediate_size": 128}))
    folder = shapes.make(str(tmp_path / "config.json"), torch.bfloat16, tmp_path / "model")
    with Accelerate(Setup(str(folder), dtype, 1, World()), Accelerate.Options()) as engine:
        assert engine._batches is not None
        weight = engine._batches.loaded.model.model.layers[1].mlp.down_proj.weight
        if dtype == "int8":
            values = weight.data.float() * weight.SCB[:, None] / 127
        else:
            values = rounding.dequantize_4bit(weight.data, weight.quant_state).float()
        assert values.shape == (64, 128)
        assert values.std().item() == pytest.approx(0.3, rel=0.1)
        assert len(values.unique()) > 10
