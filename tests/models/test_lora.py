"""LoRA adapters: what peft has saved is merged as peft merges it, and what cannot be merged is a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from batchgen import models
from batchgen.models import loading, lora
from batchgen.models.definition.errors import ModelError
from batchgen.models.tokenizer import HfTokenizer
from batchgen.tensor_parallel.weights import copy_weights, map_model
from tests import adapters
from tests.tiny_models import byte_tokenizer

IDS = torch.arange(3, 43).reshape(2, 20)
EACH = [(base, case) for base, cases in adapters.CASES.items() for case in cases]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base models of `adapters.CASES`, by name."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: adapters.save_base(folder / name, name) for name in adapters.CASES}


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of all linear layers of the Llama, and the model into which peft has merged it."""
    folder = tmp_path_factory.mktemp("plain")
    settings = {"target_modules": "all-linear"}
    return adapters.save_adapter(
        bases["llama"], folder / "adapter", settings, merged=folder / "merged"
    ), folder / "merged"


def load(model: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    given = {"dtype": dtype, "device_map": {"": "cpu"}, **arguments}
    return loading.load(str(model), given, adapter="" if adapter is None else str(adapter))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def check(adapter: Path, model: Path) -> None:
    lora.check_adapter(str(adapter), model, HfTokenizer(str(model)))


@pytest.mark.parametrize(("base", "case"), EACH, ids=[f"{base}: {case}" for base, case in EACH])
def test_the_merged_model_is_that_of_peft(base: str, case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    adapter = adapters.save_adapter(bases[base], tmp_path / "adapter", adapters.CASES[base][case], merged=merged)
    check(adapter, bases[base])
    expected = logits(load(merged))
    assert torch.equal(logits(load(bases[base], adapter)), expected)
    assert (expected - logits(load(bases[base]))).abs().max() > 0.1


def test_experts_that_were_layers_of_their_own_are_found(bases: dict[str, Path], tmp_path: Path) -> None:
    """Transformers 4 had a linear layer for each matrix of an expert, by the names that the model's files have."""
    base = bases["mixtral"]
    adapter = adapters.save_adapter(base, tmp_path / "adapter", {"target_modules": ["q_proj"], "lora_alpha": 12})
    tensors, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name in [name for name in weights if ".experts.2." in name or ".1.block_sparse_moe.experts.0." in name]:
        rows, columns = weights[name].shape
        down, up = torch.randn(4, columns), torch.randn(rows, 4)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    for name in [name for name in tensors if "lora_A" in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        weights[weight] = weights[weight] + 3.0 * (tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged = shutil.copytree(base, tmp_path / "merged")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(base, adapter)), logits(load(merged)))
    layer = "base_model.model.model.layers.0.block_sparse_moe.experts"
    tensors[f"{layer}.2.w1.lora_B.weight"] = torch.ones(48, 4)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"experts\.2\.w1\.\S+ is for a weight of \[48, 32\], and \S+ is \[64, 32\]"):
        load(base, adapter)
    matrices = {
        f"{layer}.4.w1.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (4, 32)), ("B", (64, 4)))
    }
    save_file(matrices, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"experts\.4\.w1\.\S+ is for expert 4, and the model has 4 \(0 to 3\)"):
        load(base, adapter)


@pytest.mark.parametrize("way", ["disk", "int8", "nf4"])
def test_what_goes_to_a_disk_or_is_rounded_has_been_merged_before(
    way: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    # In 16 bits from the beginning, so that both models have been rounded once.
    load(bases["llama"], dtype=torch.float16).save_pretrained(tmp_path / "base")
    every, merged = {"target_modules": "all-linear"}, tmp_path / "merged"
    adapter = adapters.save_adapter(tmp_path / "base", tmp_path / "adapter", every, merged=merged)
    arguments: dict[str, Any] = {"dtype": torch.float16}
    if way == "disk":
        places = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
        arguments["device_map"] = {**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"}
    else:
        quantized = BitsAndBytesConfig(load_in_8bit=way == "int8", load_in_4bit=way == "nf4")  # type: ignore[no-untyped-call]
        arguments["quantization_config"] = quantized
    model = load(tmp_path / "base", adapter, offload_folder=str(tmp_path / "one"), **arguments)
    expected = load(merged, offload_folder=str(tmp_path / "two"), **arguments)
    assert len(list(tmp_path.glob("one/*layers.1.mlp*"))) == (3 if way == "disk" else 0)
    assert torch.equal(logits(model), logits(expected))


def test_weights_in_16_bits_are_merged_in_32_and_rounded_once(
    bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    load(bases["llama"], dtype=torch.bfloat16).save_pretrained(half, max_shard_size="20KB")
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(plain[0] / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    weight = load(half).get_parameter(f"{name}.weight")
    exact = weight + 2.0 * (up @ down)  # lora_alpha 8 by a rank of 4
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(load(half, plain[0], dtype).get_parameter(f"{name}.weight"), exact.to(dtype))
    shared = map_model(str(half), None, str(plain[0]))
    change = lora.place_by_config(lora.read_adapter(str(plain[0])), shared.config).whole[f"{name}.weight"]
    additions = {f"{name}.weight": change.compute_product}
    copy_weights(shared, str(half), torch.device("cpu"), torch.float32, additions=additions)
    assert torch.equal(shared.get_parameter(f"{name}.weight"), exact)


def test_a_pickled_adapter_is_read_and_runs_no_code(
    bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(plain[0], tmp_path / "adapter")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(load(bases["llama"], folder)), logits(load(plain[1])))
    torch.save({"weight": print}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin holds more than tensors"):
        check(folder, bases["llama"])


def test_a_new_value_of_a_tied_embedding_is_taken_if_both_ends_have_it(tmp_path: Path) -> None:
    base = adapters.save_base(tmp_path / "tied", "llama", tie_word_embeddings=True)
    adapter = adapters.save_adapter(base, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    new = torch.randn_like(load(base).get_input_embeddings().weight)
    tensors = load_file(adapter / "adapter_model.safetensors")
    ends = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    save_file({**tensors, **{name: new.clone() for name in ends}}, adapter / "adapter_model.safetensors")
    check(adapter, base)
    loaded = load(base, adapter)
    assert torch.equal(loaded.get_input_embeddings().weight, new)
    assert torch.equal(loaded.get_output_embeddings().weight, new)
    save_file({**tensors, ends[0]: new}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight, which is one weight with lm_head\.weight"):
        check(adapter, base)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor], Path], None]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def settings(**values: Any) -> Change:
    return lambda config, tensors, folder: config.update(values)


def tensor(name: str, *shape: int) -> Change:
    return lambda config, tensors, folder: tensors.update({name: torch.ones(shape)})


def _without_b(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    del tensors[f"{QUERY}.lora_B.weight"]


def _with_a_token(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)


def _without_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    tensors.clear()


REFUSED: dict[str, tuple[Change, str]] = {
    "another kind": (settings(peft_type="IA3"), r"adapter_config\.json: peft_type is 'IA3', and --adapter merges LoRA"),
    "no kind": (settings(peft_type=None), r"peft_type is None"),
    "layers twice": (settings(layer_replication=[[0, 2]]), r"sets layer_replication, which --adapter does not merge"),
    "a changed base": (settings(init_lora_weights="pissa_niter_4"), r"'pissa_niter_4', which changes the base model"),
    "no rank": (settings(r="4"), r"r and lora_alpha must be finite numbers"),
    "an endless factor": (settings(lora_alpha=float("inf")), r"r and lora_alpha must be finite numbers"),
    "a factor that is none": (settings(lora_alpha=float("nan")), r"r and lora_alpha must be finite numbers"),
    "a factor beyond any float": (settings(lora_alpha=10**400), r"r and lora_alpha must be finite numbers"),
    "a pattern that is none": (
        settings(rank_pattern={"q_proj(": 4}),
        r"adapter_config\.json: the layer 'q_proj\(' in rank_pattern is no regular expression \(missing \)",
    ),
    "patterns in a list": (settings(alpha_pattern=["q_proj"]), r"alpha_pattern must be an object of numbers by layers"),
    "parameters that are no names": (settings(target_parameters=3), r"target_parameters must be a list of names"),
    "a number that is none": (
        lambda config, tensors, folder: tensors[f"{QUERY}.lora_A.weight"].fill_(float("nan")),
        r"the tensor base_model\S+q_proj\.lora_A\.weight holds NaN or infinity",
    ),
    "whole numbers": (
        lambda config, tensors, folder: tensors.update(
            {f"{QUERY}.lora_A.weight": tensors[f"{QUERY}.lora_A.weight"].to(torch.int8)}
        ),
        r"the tensor base_model\S+q_proj\.lora_A\.weight holds numbers of type int8",
    ),
    "too few lengths": (
        tensor(f"{QUERY}.lora_magnitude_vector.weight", 7),
        r"q_proj\.weight, DoRA has 7 lengths for 32 rows",
    ),
    "an output matrix without rows": (
        tensor("base_model.model.lm_head.weight"),
        r"lm_head\.weight is for a weight of \[\], and lm_head\.weight is \[260, 32\]",
    ),
    "an output matrix in a row": (
        tensor("base_model.model.lm_head.weight", 8320),
        r"lm_head\.weight is for a weight of \[8320\], and lm_head\.weight is \[260, 32\]",
    ),
    "another rank": (settings(r=8), r"says rank 8 for model\.layers\.0\.\S+, and base_model\S+ is \[4, \d+\]"),
    "other layers": (
        tensor("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", 4, 32),
        r"is not whole: of lora_A and lora_B of model\.layers\.7\.mlp\.up_proj\.weight, it has",
    ),
    "no such layer": (
        tensor("base_model.model.model.layers.7.norm.weight", 32),
        r"layers\.7\.norm\.weight, which a llama",
    ),
    "half of it": (
        _without_b,
        r"is not whole: .* it has base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A",
    ),
    "another width": (
        tensor(f"{QUERY}.lora_A.weight", 4, 48),
        r"q_proj\.lora_A\.weight is for a weight of \[32, 48\], and model\.\S+\.q_proj\.weight is \[32, 32\]",
    ),
    "no layer of ours": (
        tensor("base_model.model.prompt_encoder", 4),
        r"prompt_encoder is of no kind that can be merged",
    ),
    "another tuner": (tensor(f"{QUERY}.lora_E", 4), r"lora_E is of no kind that can be merged"),
    "a longer embedding": (
        tensor("base_model.model.model.embed_tokens.weight", 300, 32),
        r"has 300 tokens and the model 260: it brings tokens of its own",
    ),
    "a token more": (_with_a_token, r"tokens that the model's has not: '<tool>' \(one of 1\)"),
    "no tensor": (_without_tensors, r"holds an adapter without a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_sentence(
    name: str, bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    change, sentence = REFUSED[name]
    folder = shutil.copytree(plain[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        models.check_there(str(bases["llama"]), str(folder))
    if name != "a token more":  # which no weight tells
        with pytest.raises(ModelError, match=sentence):
            load(bases["llama"], folder)


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, r"the adapter \S+ is not there\. --adapter takes a folder"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        r"holds no adapter: there is no adapter_config",
    ),
    "no file of tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"holds adapter_config\.json, but not the tensors \(adapter_model\.safetensors\)",
    ),
    "a cut file": (_cut, r"adapter_model\.safetensors cannot be read \(.*\); copy the adapter again"),
    "a pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        r"is a pointer of Git LFS",
    ),
    "a config that is no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        r"adapter_config\.json is no JSON: line 1",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_whole_adapter_is_one_sentence(
    name: str, bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    change, sentence = FOLDERS[name]
    change(folder := shutil.copytree(plain[0], tmp_path / "adapter"))
    with pytest.raises(ModelError, match=sentence):
        models.check_there(str(bases["llama"]), str(folder))


def test_the_wrong_model_is_refused_by_the_first_tensor_that_does_not_fit(
    bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight, which a bloom model has not"):
        check(plain[0], bases["bloom"])
    with pytest.raises(ModelError, match=r"holds a whole model, which --model takes"):
        models.check_there(str(bases["llama"]), str(bases["bloom"]))
    packed = shutil.copytree(bases["llama"], tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"the weights in \S+ are packed"):
        check(plain[0], packed)


def test_an_adapter_is_told_from_another_by_either_of_its_files(plain: tuple[Path, Path], tmp_path: Path) -> None:
    def revision(folder: Path) -> str:
        return models.resolve(str(plain[1]), tmp_path, print, str(folder)).adapter_revision

    same = shutil.copytree(plain[0], tmp_path / "same")
    assert revision(same) == revision(plain[0])
    path = same / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert revision(same) != revision(plain[0])
    shutil.copy(plain[0] / path.name, path)
    config = same / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert revision(same) != revision(plain[0])


def test_a_chat_template_beside_the_adapter_is_not_used_in_silence(
    bases: dict[str, Path], plain: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = shutil.copytree(plain[0], tmp_path / "adapter")
    check(adapter, bases["llama"])
    assert not caplog.messages
    byte_tokenizer().save_pretrained(adapter)
    check(adapter, bases["llama"])
    assert "has a chat template that is not the model's" in caplog.text
    caplog.clear()
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    byte_tokenizer().save_pretrained(base)
    check(adapter, base)
    assert not caplog.messages
