"""`--dtype fp8`, `int8` and `int4`: the text is that of a model whose weights have been rounded beforehand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from batchgen.engine import EngineError, Setup
from batchgen.engines import parse_options
from batchgen.engines.paged.engine import Paged
from batchgen.models.quantised.rounding import Scheme, round_weight
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt
from batchgen.world import World
from tests import tiny_models as models
from tests.engines.runs import command, rows, run, texts
from tests.tensor_parallel import test_texts

WIDE = {"hidden_size": 64, "intermediate_size": 128}
BUILDS = {
    "falcon": partial(test_texts.build, name="falcon"),
    "gpt2": partial(test_texts.build, name="gpt2", initializer_range=0.3),
    "llama": partial(models.llama, **WIDE),
    "gpt_oss": partial(test_texts.build, name="gpt_oss"),
    "qwen3_moe": partial(test_texts.build, name="qwen3_moe"),
}


def save_rounded(folder: Path, out: Path, group_size: int) -> Path:
    """Writes the model in `folder` with each matrix of its layers rounded to 4 bits, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, parameter in model.named_parameters():
        is_kept = parameter.dim() < 2 or "router" in path or "gate.weight" in path or "bias" in path
        if is_kept or not (".layers." in path or ".h." in path):
            continue
        turned = folder.name == "gpt2" or (folder.name == "gpt_oss" and parameter.dim() == 3)
        matrix = parameter.data.transpose(-1, -2) if turned else parameter.data
        wide = round_weight(matrix, Scheme("int4", group_size), torch.float32).widen()
        parameter.data = wide.transpose(-1, -2).contiguous() if turned else wide
    model.save_pretrained(out)
    models.byte_tokenizer().save_pretrained(out)
    return out


def generate(folder: Path, dtype: str, *settings: str) -> dict[str, str | None]:
    prompts: list[Prompt] = models.random_prompts(16, longest=60)
    setup = Setup(str(folder), dtype, 6, World())
    with Paged(setup, parse_options(Paged, settings)) as engine:
        batches = list(engine.generate(iter(prompts), lambda: False))
    return {one.id: one.text for batch in batches for one in batch.generations}


@pytest.mark.parametrize("name", BUILDS)
def test_the_text_is_that_of_rounded_weights(name: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / name, BUILDS[name])
    found = generate(folder, "int4", "group_size=32")
    assert found == generate(save_rounded(folder, tmp_path / f"{name}-rounded", 32), "float32")
    assert found != generate(folder, "float32"), "these prompts would not tell"


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_bits_change_little(dtype: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "llama", BUILDS["llama"])
    exact, found = generate(folder, "float32"), generate(folder, dtype)
    firsts = [(text, exact[key]) for key, text in found.items() if text and exact[key]]
    assert len(firsts) > 8
    assert sum(text[0] == other[0] for text, other in firsts if other) > len(firsts) / 2


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "llama", models.llama)
    tokenizer = HfTokenizer(str(folder))

    def check(dtype: str, *settings: str) -> None:
        Paged.check(Setup(str(folder), dtype, None, World()), tokenizer, parse_options(Paged, settings))

    with pytest.raises(EngineError, match="group_size=64 is of --dtype int4 alone, and this run has int8"):
        check("int8", "group_size=64")
    with pytest.raises(EngineError, match="group_size=48: must be one of 32, 64, 128"):
        check("int4", "group_size=48")
    tokenizer.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(EngineError, match=r"quantised already \(awq.*leave --dtype fp8 out"):
        check("fp8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon", "llama", "qwen3_moe"])
def test_ranks_that_share_a_model_round_their_shares(name: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / name, BUILDS[name])
    prompts = rows(tmp_path / "p.jsonl", 12)
    words = ["--dtype", "int4", "--set", "group_size=32"]
    for way, more in {"alone": [], "two": ["--tp", "2"]}.items():
        done = run(*command(prompts, tmp_path / way, folder, *words, *more, engine="paged"))
        assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "alone") == texts(tmp_path / "two")
