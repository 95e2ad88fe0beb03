"""`batchgen quantise`: what it prints, and that the text of what it wrote is that of the same `--dtype`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import batchgen
from batchgen.commands import main
from tests import tiny_models as models
from tests.commands.starts import read_rows, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128}
    return models.save(tmp_path_factory.mktemp("model") / "llama", models.llama, **shape)


def test_the_text_is_that_of_the_same_dtype(model: Path, tmp_path: Path) -> None:
    words = ["quantise", str(model), str(tmp_path / "small"), "--dtype", "int4", "--group-size", "32"]
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 0, made.output
    assert str(tmp_path / "small") in made.output.splitlines()
    assert "GB written, the last of them lm_head.weight" in made.output
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "abcdefgh " * count} for count in range(1, 9)])
    of_int4 = {"dtype": "int4", "engine_settings": ["group_size=32"]}
    texts = {}
    for name, (folder, settings) in {
        "loaded": (tmp_path / "small", {}),
        "rounded": (model, of_int4),
        "exact": (model, {}),
    }.items():
        given = batchgen.RunSettings(model=str(folder), engine="paged", **settings)  # type: ignore[arg-type]
        batchgen.run(str(rows), tmp_path / name, given)
        texts[name] = [row["text"] for row in read_rows(tmp_path / name / "generations.jsonl")]
    assert texts["loaded"] == texts["rounded"]
    assert texts["loaded"] != texts["exact"]


def test_words_that_do_not_go_together_are_refused(model: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["quantise", str(model), "out", "--dtype", "fp8", "--group-size", "64"])
    assert refused.exit_code == 2
    assert "--group-size is of --dtype int4 alone" in refused.output
    refused = CliRunner().invoke(main, ["quantise", str(model), str(tmp_path), "--dtype", "fp8"])
    assert refused.exit_code == 4
    assert "exists; choose another folder" in refused.output


# For sitecustomize: the file of weights never comes to its end.
ENDLESS = """
import time
from batchgen.tensor_parallel import written_folder
save_file = written_folder.save_file
def slowly(*arguments, **options):
    save_file(*arguments, **options)
    time.sleep(300)
written_folder.save_file = slowly
"""


def test_a_kill_leaves_nothing_that_looks_like_a_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(ENDLESS)
    path = f"{tmp_path / 'code'}:{os.environ.get('PYTHONPATH', Path(__file__).parents[2])}"
    words = ["quantise", str(model), str(tmp_path / "out"), "--dtype", "int8"]
    process = subprocess.Popen([sys.executable, "-m", "batchgen", *words], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out-*/half/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out-*/half")
    assert not (left / "config.json").exists()
