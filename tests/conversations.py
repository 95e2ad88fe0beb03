"""Chat templates in the manner of many families, tokenizers that use them, and what Transformers makes of them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

from batchgen.models.tokenizer import HfTokenizer
from tests import tiny_models as models

TEMPLATES = Path(__file__).parent / "chat_templates"

# What each reads in a user's message; in other roles it may be less.
PARTS_ALONE = ("idefics", "llava")
EITHER = ("gemma-3", "glm-4", "llama-3-vision", "qwen2-vl")

# How each reads the arguments of a call; all others read objects.
TEXT_ARGUMENTS = ("deepseek-r1",)
EITHER_ARGUMENTS = ("qwen3",)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}},
    },
}


def families() -> list[str]:
    """The names of all templates."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def save(folder: Path, chat_template: object = None) -> Path:
    """A model folder without weights; `chat_template` goes into its tokenizer_config.json."""
    models.byte_tokenizer(None).save_pretrained(folder)
    LlamaConfig(**models.SMALL | {"vocab_size": 260, "max_position_embeddings": 100_000}).save_pretrained(folder)
    if chat_template is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat_template}))
    return folder


class Family:
    """One template: batchgen's tokenizer of it, and Transformers' tokenizer."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        save(folder)
        shutil.copy(TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
        self.tokenizer = HfTokenizer(str(folder))
        self._hf_tokenizer = AutoTokenizer.from_pretrained(folder)

    def rendered(self, messages: Sequence[Mapping[str, object]], **kwargs: Any) -> str | None:
        """What Transformers' own call makes of the messages; None: the template refuses them."""
        own = copy.deepcopy([with_arguments(message, self.name) for message in messages])
        try:
            return str(
                self._hf_tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True, **kwargs)
            )
        except Exception:
            return None


def with_arguments(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The message with the arguments of its calls as the template reads them: most read objects, one JSON text."""
    if "tool_calls" not in message or name in EITHER_ARGUMENTS:
        return dict(message)
    calls = copy.deepcopy(message["tool_calls"])
    for call in calls:
        function = call["function"]
        if name in TEXT_ARGUMENTS and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        elif name not in TEXT_ARGUMENTS and isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    return {**message, "tool_calls": calls}


_MADE: dict[str, Family] = {}


def family(name: str, folder: Path) -> Family:
    """The family of that name, made once a process, by way of files in `folder`."""
    if name not in _MADE:
        _MADE[name] = Family(name, folder / name)
    return _MADE[name]


def parts(*texts: str) -> list[dict[str, object]]:
    """A content of parts."""
    return [{"type": "text", "text": text} for text in texts]


def joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content a text, parts on a line each."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def split(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content a list of parts."""
    return [
        {**message, "content": parts(message["content"])} if isinstance(message.get("content"), str) else dict(message)
        for message in messages
    ]
