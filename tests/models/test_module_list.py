"""The list of Transformers' modules that is handed over is the one that it would make."""

from __future__ import annotations

import subprocess
import sys

from transformers.utils import import_utils

from batchgen.models.module_list import _FOLDER, find_modules


def test_the_list_is_the_one_that_transformers_makes() -> None:
    assert find_modules() == import_utils.define_import_structure(str(_FOLDER / "__init__.py"))


def test_files_of_models_are_read_once() -> None:
    program = """
import pathlib, sys
read = []
sys.addaudithook(lambda event, args: event == "open" and read.append(str(args[0])))
import batchgen.models.architectures
import transformers
from transformers.models.bloom import BloomConfig, BloomForCausalLM
modeling = str(pathlib.Path(transformers.__file__).parent / "models/albert/modeling_albert.py")
print(read.count(modeling), transformers.utils.import_utils.define_import_structure.__module__)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", "transformers.utils.import_utils"]
