"""The model author's own settings for generation: `generation_config.json` of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from batchgen.engine import EngineError


def read_generation_config(model: str) -> dict[str, object]:
    """What the file says, nulls left out; empty if there is no such file.

    Raises:
        EngineError: it cannot be read, or is no JSON object. The message names the file and the line.
    """
    path = Path(model) / "generation_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror or error}. Look at who may read the model"
        ) from error
    except json.JSONDecodeError as error:
        raise EngineError(
            f"{path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}. Mend the file, or copy it "
            "again from where the model came from"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read as text: {error}. Copy it again") from error
    if not isinstance(values, dict):
        raise EngineError(f"{path} holds no JSON object; copy it again from where the model came from")
    return {key: value for key, value in values.items() if value is not None}
