"""Loads each model folder that is named, in each way that reads weights or a definition, and says what came of it.

    python -m tests.engines.hostile_models FOLDER…

prints {"FOLDER": {"WAY": "loaded", or the sentence}} on stdout. In a process of its own: DeepSpeed is one of the ways.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from batchgen import engines
from batchgen.commands import results_only_on_stdout
from batchgen.engine import Setup
from batchgen.models import ResolvedModel, cache_folder
from batchgen.models.parameters import list_parameters
from batchgen.tensor_parallel import split_files
from batchgen.types import UserError
from batchgen.world import World

ENGINES = ("accelerate", "paged", "ds-inference", "ds-zero")


def load(name: str, model: str) -> None:
    kind = engines.find(name)
    setup = Setup(model, "float32", 2, World(), run="hostile", cache=str(cache_folder(os.environ)))
    try:
        with kind(setup, engines.parse_options(kind, [])):
            pass
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def plan(model: str) -> None:
    kind = engines.find("accelerate")
    config: Any = kind.tokenizer(model)
    list_parameters(config.config, torch.float32)


def split(model: str) -> None:
    source = ResolvedModel(Path(model), "hostile", "")
    split_files.write_split(source, Path(model).with_name(f"{Path(model).name}-split"), 1, "float32", lambda said: None)


def read_split(model: str) -> None:
    split_files.build_hollow(Path(model), torch.float32, None)


WAYS: dict[str, Callable[[str], None]] = {
    **{name: partial(load, name) for name in ENGINES},
    "plan": plan,
    "split": split,
    "read_split": read_split,
}


def main(models: list[str]) -> None:
    """Each way with each of `models`."""
    found: dict[str, dict[str, str]] = {}
    with results_only_on_stdout():
        for name, way in WAYS.items():
            for model in models:
                try:
                    way(model)
                    said = "loaded"
                except (UserError, ValueError) as error:
                    said = f"{type(error).__name__}: {error}"
                unset_hf_deepspeed_config()  # while it is set, Transformers shards every model it makes
                found.setdefault(model, {})[name] = said
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
