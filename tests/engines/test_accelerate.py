"""Engine `accelerate` on the CPU: what loads, where it is put, and the sentence when it cannot be."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchgen.bench import workloads
from batchgen.engine import EngineError, Setup
from batchgen.engines import find, parse_options
from batchgen.engines.accelerate import Accelerate
from batchgen.models.definition.errors import ModelError
from batchgen.types import Generation, Prompt, SamplingParams
from batchgen.world import World
from tests import tiny_models as models

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")


def load(
    model: Path, *settings: str, dtype: str = "auto", batch_size: int = 4, world: World | None = None
) -> Accelerate:
    setup = Setup(str(model), dtype, batch_size, world or World())
    return Accelerate(setup, parse_options(Accelerate, settings))


def prompts(count: int = 6) -> list[Prompt]:
    source = random.Random(5)
    return [
        workloads.prompt(
            number,
            [models.BEGIN, *(source.randrange(4, 260) for _ in range(source.randrange(1, 30)))],
            SamplingParams(max_new_tokens=8 + number),
        )
        for number in range(count)
    ]


def generate(engine: Accelerate) -> list[Generation]:
    return [g for batch in engine.generate(iter(prompts()), lambda: False) for g in batch.generations]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[Generation]:
    with load(tiny_llama, "device_map=cpu") as engine:
        return generate(engine)


@pytest.fixture
def loose_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_is_found_by_its_file_name() -> None:
    assert find("accelerate") is Accelerate


def test_every_prompt_comes_back_once_and_its_tokens_are_counted(tiny_llama: Path) -> None:
    with load(tiny_llama) as engine:
        generations = generate(engine)
        assert [g.index for g in generations] == list(range(6))
        assert engine.signs.generated_tokens == sum(g.generated_tokens for g in generations) > 0


def test_the_tokenizer_needs_no_weights(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = Accelerate.tokenizer(str(folder))
    assert tokenizer.context == 512
    with pytest.raises(
        ModelError, match=r"holds no weights that Transformers reads \(model\.safetensors or the like\)"
    ):
        load(folder)


@pytest.mark.parametrize(("asked", "loaded"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_loaded_in_the_dtype_that_is_given(tmp_path: Path, asked: str, loaded: torch.dtype) -> None:
    folder = models.save(tmp_path / "bf16", lambda n: models.llama(n).to(torch.bfloat16))
    with load(folder, dtype=asked) as engine:
        assert engine._batches is not None
        assert engine._batches.loaded.model.dtype == loaded
        assert len(generate(engine)) == 6


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantized_weights_load_and_generate(tmp_path: Path, dtype: str) -> None:
    folder = models.save(tmp_path / "llama", lambda n: models.llama(n, hidden_size=64, intermediate_size=128))
    with load(folder, "device_map=cpu", dtype=dtype) as engine:
        assert engine._batches is not None
        kinds = {p.dtype for p in engine._batches.loaded.model.model.layers.parameters()}
        assert kinds & {torch.int8, torch.uint8}
        assert all(g.text and g.generated_tokens for g in generate(engine))


def test_weights_spilled_to_a_disk_give_the_same_tokens(tiny_llama: Path, expected: list[Generation]) -> None:
    with load(tiny_llama, "max_memory=cpu=60KB") as engine:
        assert engine._batches is not None
        assert "disk" in engine._batches.loaded.model.hf_device_map.values()
        assert engine._spill is not None
        spill = Path(engine._spill.name)
        assert spill.is_dir()
        assert generate(engine) == expected
    assert not spill.exists()


def test_a_given_offload_folder_is_used_and_kept(tiny_llama: Path, expected: list[Generation], tmp_path: Path) -> None:
    with load(tiny_llama, "max_memory=cpu=60KB", f"offload_folder={tmp_path / 'spill'}") as engine:
        assert generate(engine) == expected
    assert (tmp_path / "spill").is_dir()


def test_another_attention_gives_the_same_tokens(tiny_llama: Path, expected: list[Generation]) -> None:
    with load(tiny_llama, "attn_implementation=eager") as engine:
        assert generate(engine) == expected


@WITHOUT_GPU
def test_heads_that_share_keys_have_them_in_memory_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's fused kernel on a GPU needs that (see batchgen.models.loading).
    folder = models.save(tmp_path / "model", partial(models.llama, num_key_value_heads=1))
    attention, strides = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        strides.update((key.stride(1), value.stride(1)) if key.shape[1] > 1 else ())
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with load(folder) as engine:
        done = [
            g for batch in engine.generate(iter(models.random_prompts(4)), lambda: False) for g in batch.generations
        ]
    assert len(done) == 4
    assert strides
    assert 0 not in strides


def test_ranks_share_the_cores_unless_someone_has_decided(
    tiny_llama: Path, expected: list[Generation], monkeypatch: pytest.MonkeyPatch, loose_threads: None
) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(cores)
    load(tiny_llama, world=World(1, 1, 2, 2)).close()
    assert torch.get_num_threads() == cores
    monkeypatch.delenv("OMP_NUM_THREADS")
    with load(tiny_llama, world=World(1, 1, 2, 2)) as engine:
        assert torch.get_num_threads() == max(1, cores // 2)
        assert generate(engine) == expected


def test_a_closed_engine_holds_no_weights(tiny_llama: Path) -> None:
    engine = load(tiny_llama, "max_memory=cpu=60KB")
    assert engine._batches is not None
    model = weakref.ref(engine._batches.loaded.model)
    assert list(engine.generate(iter(prompts(1)), lambda: False))
    assert model() is not None
    engine.close()
    assert model() is None
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        next(engine.generate(iter(prompts()), lambda: False))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["device_map=moon"], "device_map=moon: must be auto, balanced"),
        (["max_memory=lots"], "must look like 0=20GiB,cpu=64GiB"),
        (["device_map=cpu", "max_memory=cpu=1GiB"], "leave one of them out"),
        (["attn_implementation=mirrors"], "cannot be loaded: .*mirrors"),
        (["colour=blue"], "no setting 'colour'. Its settings: device_map, max_memory, offload_folder"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tiny_llama: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        load(tiny_llama, *settings)


def test_a_model_that_does_not_load_leaves_no_folder_behind(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with load(tiny_llama, "max_memory=cpu=60KB"):
        assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(EngineError, match="mirrors"):
        load(tiny_llama, "max_memory=cpu=60KB", "attn_implementation=mirrors")
    assert list(tmp_path.iterdir()) == []


@WITHOUT_GPU
@pytest.mark.parametrize("setting", ["device_map=cuda", "device_map=cuda:3", "max_memory=0=1GiB,cpu=1GiB"])
def test_a_gpu_that_is_not_there_is_one_sentence(tiny_llama: Path, setting: str) -> None:
    with pytest.raises(EngineError, match=r"asks for a GPU, but torch .* sees none"):
        load(tiny_llama, setting)


def test_spreading_a_model_under_several_ranks_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="each rank holds a whole model"):
        load(tiny_llama, "max_memory=cpu=1GiB", world=World(0, 0, 2, 2))


def test_an_unknown_dtype_is_one_sentence(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="choose auto, float32, bfloat16, float16, int8 or nf4"):
        load(tiny_llama, dtype="float7")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "t5"}, "is an encoder with a decoder"),
        ({"model_type": "unheard_of"}, "does not know model_type"),
    ],
)
def test_an_architecture_that_generates_no_text_is_one_sentence(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(EngineError, match=sentence):
        load(folder)


def test_weights_that_are_not_complete_are_refused_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"not complete: model\.layers\.1\.mlp\.up_proj\.weight .* missing"):
        load(folder)


def test_a_torn_weight_file_is_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(EngineError, match="cannot be loaded"):
        load(folder)


def test_tied_weights_are_not_missing(tiny_bloom: Path) -> None:
    with load(tiny_bloom) as engine:
        assert len(generate(engine)) == 6


class Intruder:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def test_pickled_weights_load_but_run_no_code(tiny_llama: Path, tmp_path: Path, expected: list[Generation]) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(tiny_llama / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    with load(folder) as engine:
        assert generate(engine) == expected
    trace = tmp_path / "trace"
    torch.save(tensors | {"intruder": Intruder(trace)}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(EngineError, match="cannot be loaded"):
        load(folder)
    assert not trace.exists()


_QUIET = """
import sys
import tempfile
import weakref
from pathlib import Path
from tests.engines.test_accelerate import generate, load
with load(Path(sys.argv[1])) as engine:
    generate(engine)
"""


def test_nothing_is_written_where_results_go(tiny_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _QUIET, str(tiny_llama)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
