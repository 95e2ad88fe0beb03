"""Whether a folder is a model's at all, and if not, what else it is and what to give in its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

from batchgen.models.definition.errors import ModelError
from batchgen.models.definition.files import check_file, read_json

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_CACHED = re.compile(r"models--.+")


def check_model_folder(folder: Path) -> None:
    """Whether `folder` holds a whole model in the layout of the Hugging Face hub, by the names of its files.

    Raises:
        ModelError: it does not; the message says what it is.
    """
    if not check_file(folder / CONFIG):
        raise ModelError(f"{folder} {_describe(folder)}")
    if check_file(folder / _ADAPTER):
        raise ModelError(
            f"{folder} holds a model and {_describe_adapter(folder)} beside it, of which batchgen would use the model "
            "alone. Move the adapter's files into a folder of their own, and give that as --adapter if it is meant"
        )


def snapshot_in(folder: Path, config: str = CONFIG) -> Path:
    """The snapshot that a folder of the hub's cache (`models--ORG--NAME`) stands for; any other folder itself.

    Args:
        config: the file without which a snapshot is not whole.

    Raises:
        ModelError: there are several, and none is named.
    """
    if not _CACHED.fullmatch(folder.name) or not (folder / "snapshots").is_dir() or (folder / config).exists():
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if (path / config).exists())
    main = folder / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if folder / "snapshots" / commit in snapshots:
        return folder / "snapshots" / commit
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise ModelError(f"{folder} is a folder of the hub's cache without a whole snapshot; pull the model again")
    raise ModelError(
        f"{folder} is a folder of the hub's cache with {len(snapshots)} snapshots; give one of them: "
        + ", ".join(str(path) for path in snapshots[:4])
    )


def _describe(folder: Path) -> str:
    """What a folder without a config is."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.is_dir() and not names:
        return "is not a model folder: it holds no config.json, it is empty"
    if _ADAPTER in names:
        way = "merge it first (peft's merge_and_unload); --model takes whole models"
        if (read_json(folder / _ADAPTER) or {}).get("peft_type") == "LORA":
            way = "give it as --adapter, and the model that it belongs to as --model"
        return f"is {_describe_adapter(folder)}: {way}"
    why = "is not a model folder: it holds no config.json"
    if any(name.endswith(".gguf") for name in names):
        return f"{why}, but GGUF files, which batchgen does not read; take the model in the layout of Transformers"
    if "model_index.json" in names:
        return f"{why}, but a pipeline that makes images (model_index.json); --model takes language models"
    if "params.json" in names:
        return f"{why}, but a model in its maker's own layout (params.json); take the one in the layout of Transformers"
    if any(_CACHED.fullmatch(name) for name in names):
        found = [name for name in names if _CACHED.fullmatch(name)]
        return f"{why}, but {len(found)} models of the hub's cache; give one of them: {', '.join(found[:4])}"
    below = [name for name in names if (folder / name / CONFIG).is_file()]
    if below:
        return f"{why}, but its folder{'s' if len(below) > 1 else ''} {', '.join(below[:4])} do" + (
            "; give one of them" if len(below) > 1 else "es; give that one"
        )
    return why


def _describe_adapter(folder: Path) -> str:
    """The adapter in `folder`: its kind, and the model that it belongs to."""
    values = read_json(folder / _ADAPTER) or {}
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    kind = "LoRA" if kind == "LORA" else str(kind) if isinstance(kind, str) else ""
    of = f" of {json.dumps(base)[1:-1]}" if isinstance(base, str) and base else ""
    return f"{'an' if not kind else 'a'}{' ' + kind if kind else ''} adapter{of} ({_ADAPTER})"
