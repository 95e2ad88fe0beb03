"""Weights that are mapped and brought one by one; shares of a model in files of their own."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from batchgen.engine import EngineError
from batchgen.models import ModelError, ResolvedModel, resolve, split_folder
from batchgen.models.int8 import Int8Weight
from batchgen.tensor_parallel import copy_weights, map_model, process_group, read_split, split, write_split
from batchgen.tensor_parallel.stored_dtype import find_stored_dtype
from tests import tiny_models as models

CPU = torch.device("cpu")


def resident() -> dict[str, int]:
    """This process's memory in bytes, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {kind: int(found[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB of weights."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 5}
    return models.save(tmp_path_factory.mktemp("models") / "large", partial(models.llama, **shape))


def size(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_a_share_is_all_that_is_read_or_held(large: Path) -> None:
    # What loading and splitting import and allocate for good is there before the measurement.
    for measured in (False, True):
        before = resident()
        with process_group.fake_group(1, 4):
            model = map_model(str(large), None)
            whole = size(model)
            group = torch.distributed.group.WORLD
            assert group is not None
            split(model, group)
            views = resident()
            copy_weights(model, str(large), CPU, torch.float32)
        after = resident()
        share = size(model)
        assert whole > 70e6
        assert share < 0.3 * whole
        if measured:
            assert views["RssAnon"] - before["RssAnon"] < 0.1 * whole
            assert after["RssAnon"] - before["RssAnon"] < 1.3 * share
            assert after["RssFile"] - before["RssFile"] < 0.3 * share, "pages of the files are let go"
        del model


def test_the_type_is_that_of_the_files_and_of_most_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 3, dtype=torch.bfloat16), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert find_stored_dtype(tmp_path) == torch.bfloat16
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EngineError, match="cannot be read as safetensors"):
        find_stored_dtype(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(3, dtype=torch.float16), "n": 1}, tmp_path / "pytorch_model.bin")
    assert find_stored_dtype(tmp_path) == torch.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_refused_and_not_read_without_their_scales(
    bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    packed = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    shutil.copytree(tiny_llama, tmp_path / "packed")
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(EngineError, match=r"packed \(quantization_config in config.json; model\..* is of u?int8\)"):
        map_model(str(tmp_path / "packed"), None)
    with pytest.raises(EngineError, match="ranks that share a model do not read"):
        write_split(resolve(str(tmp_path / "packed"), tmp_path, print), tmp_path / "split", 2, "auto", print)
    assert not (tmp_path / "split").exists()


def test_another_type_is_made_on_the_way_and_tied_weights_stay_tied(tiny_bloom: Path) -> None:
    model = map_model(str(tiny_bloom), None)
    copy_weights(model, str(tiny_bloom), CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    expected = load_file(tiny_bloom / "model.safetensors")["transformer.word_embeddings.weight"]
    assert torch.equal(model.lm_head.weight, expected.bfloat16())


def test_8_bits_replace_matrices_and_tables_alone(tiny_bloom: Path) -> None:
    model = map_model(str(tiny_bloom), None)
    copy_weights(model, str(tiny_bloom), CPU, torch.float32, rounding=Int8Weight)
    assert isinstance(model.lm_head.weight, Int8Weight)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert all(parameter.dim() == 1 for parameter in model.parameters())  # norms and biases


def resolved(folder: Path) -> ResolvedModel:
    return resolve(str(folder), folder, lambda sentence: None)


def test_files_by_rank_hold_the_same_shares_and_name_their_origin(large: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = write_split(resolved(large), tmp_path / "parts", 2, "bfloat16", said.append)
    assert [line.partition(":")[0] for line in said] == ["rank 0 of 2", "rank 1 of 2"]
    assert resolved(out).revision == resolved(large).revision
    found = split_folder.read(out)
    assert found is not None
    for rank in range(2):
        with process_group.fake_group(rank, 2):
            group = torch.distributed.group.WORLD
            assert group is not None
            model = map_model(str(large), None)
            split(model, group)
            copy_weights(model, str(large), CPU, torch.bfloat16)
            again = read_split(out, found, group, CPU, None)
        assert not again.training
        expected, got = dict(model.named_parameters()), dict(again.named_parameters())
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        for name, buffer in model.named_buffers():  # rotary frequencies, which no checkpoint has
            assert torch.equal(buffer, again.get_buffer(name))
    with pytest.raises(EngineError, match="parts exists; choose another folder"):
        write_split(resolved(large), out, 2, "auto", said.append)
    with pytest.raises(EngineError, match="is split already"):
        write_split(resolved(out), tmp_path / "more", 2, "auto", said.append)


def test_broken_files_by_rank_are_sentences(tiny_bloom: Path, tmp_path: Path) -> None:
    out = write_split(resolved(tiny_bloom), tmp_path / "parts", 2, "float32", lambda sentence: None)
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {0o666 & ~_umask()}, "all files are as open as the user wants"
    found = split_folder.read(out)
    assert found is not None
    [name] = found.files[0]
    tensors = load_file(out / name)
    tensors["transformer.word_embeddings.weight"] = tensors["transformer.word_embeddings.weight"][:-1].clone()
    save_file(tensors, out / name)
    with process_group.fake_group(0, 2):
        group = torch.distributed.group.WORLD
        assert group is not None
        with pytest.raises(EngineError, match=r"does not fit the model: .*weight is \[.*split the model again"):
            read_split(out, found, group, CPU, None)
    (out / name).write_bytes(b"nothing")
    with process_group.fake_group(0, 2):
        group = torch.distributed.group.WORLD
        assert group is not None
        with pytest.raises(EngineError, match="cannot be read"):
            read_split(out, found, group, CPU, None)
    (out / name).unlink()
    with pytest.raises(ModelError, match=f"is not whole: {name} is missing"):
        resolved(out)
    (out / split_folder.NAME).write_text(json.dumps({"ranks": 2}))
    with pytest.raises(ModelError, match=r"split\.json cannot be read"):
        resolved(out)


def test_a_model_that_cannot_be_split_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tp can be 1 to 2"):
        write_split(resolved(tiny_llama), tmp_path / "parts", 4, "auto", lambda sentence: None)
    assert not list(tmp_path.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
