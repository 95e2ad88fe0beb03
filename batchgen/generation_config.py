"""The model author's own settings for generation: `generation_config.json` of a model folder."""

from __future__ import annotations

from pathlib import Path

from batchgen.definition.files import read_json


def read_generation_config(model: str) -> dict[str, object]:
    """What the file says, nulls left out; empty if there is no such file.

    Raises:
        ModelError: it cannot be read, or is no JSON object. The message names the file and the line.
    """
    values = read_json(Path(model) / "generation_config.json") or {}
    return {key: value for key, value in values.items() if value is not None}
