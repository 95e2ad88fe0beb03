"""What the author of a model's folder cannot do, whichever part of batchgen reads it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from batchgen.models.definition.errors import ModelError
from batchgen.models.tokenizer import HfTokenizer
from tests.engines.hostile_models import WAYS
from tests.engines.runs import ROOT

CODE = """
import pathlib
pathlib.Path({trace!r}).mkdir(exist_ok=True)
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


class Intruder:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.makedirs, (str(self.trace), 0o777, True))


def pickled(model: Path, folder: Path, trace: Path) -> None:
    """Weights as `.bin` that run code, which is the only place where they are."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    torch.save({**tensors, "intruder": Intruder(trace)}, folder / "pytorch_model.bin", pickle_module=pickle)


def both(model: Path, folder: Path, trace: Path) -> None:
    """The same beside good safetensors."""
    pickled(model, folder, trace)
    shutil.copy(model / "model.safetensors", folder)


def code(model: Path, folder: Path, trace: Path, kind: str = "llama") -> None:
    """Python files that the config and the tokenizer ask to be run."""
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def found(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], bool]]:
    """What came of each kind of folder by each way of reading it, and whether its code has run."""
    here = tmp_path_factory.mktemp("hostile")
    pickled(tiny_llama, here / "pickled", here / "trace-pickled")
    both(tiny_llama, here / "both", here / "trace-both")
    code(tiny_llama, here / "code", here / "trace-code")
    code(tiny_llama, here / "unknown", here / "trace-unknown", kind="evil")
    names = ("pickled", "both", "code", "unknown")
    words = [sys.executable, "-m", "tests.engines.hostile_models", *(str(here / name) for name in names)]
    # Whoever asks whether to run it is told yes.
    done = subprocess.run(words, input="y\n" * 100, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {name: (said[str(here / name)], (here / f"trace-{name}").exists()) for name in names}


def test_the_code_is_such_as_would_run(tiny_llama: Path, tmp_path: Path) -> None:
    pickled(tiny_llama, tmp_path / "pickled", tmp_path / "trace")
    torch.load(tmp_path / "pickled" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"plan", "read_split"}))
def test_pickled_weights_run_no_code_and_are_refused(way: str, found: dict[str, tuple[dict[str, str], bool]]) -> None:
    said, ran = found["pickled"]
    assert not ran
    assert said[way].startswith("ModelError: the model in ")
    assert "holds more than tensors" in said[way]


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("kind", ["both", "code"])
def test_beside_what_is_good_they_are_not_looked_at(
    kind: str, way: str, found: dict[str, tuple[dict[str, str], bool]]
) -> None:
    said, ran = found[kind]
    assert not ran
    assert said[way] == "loaded"


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_model_that_is_code_is_refused_without_a_question(
    way: str, found: dict[str, tuple[dict[str, str], bool]]
) -> None:
    said, ran = found["unknown"]
    assert not ran
    assert "brings code of its own (auto_map), which batchgen does not run" in said[way]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__['os'].system('touch x') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 'x' * 10 ** 15 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_chat_template_reaches_nothing_but_its_conversation(
    template: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    # What is out of reach is written as nothing, or is an error.
    with pytest.raises(
        (ModelError, ValueError), match=r"leaves what the user says out|template refused these messages"
    ):
        HfTokenizer(str(folder)).chat([{"role": "user", "content": "x"}])
    assert not list((tmp_path / "work").iterdir())
