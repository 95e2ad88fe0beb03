"""Tools that a row offers, and the calls of them that a model writes. Pure.

`offers` reads what a row offers, and what it must be constrained to. Each other module is a form in which models write
calls, file name = `--tool-parser` name; which one a model uses shows in its chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

from batchgen.requests.tools import gpt_oss, hermes, json_list, llama3_json, mistral, pythonic, qwen3_coder
from batchgen.requests.tools._form import Call, Functions, ParsedCalls

__all__ = ["FORMS", "NAMED", "REQUIRED", "Call", "Functions", "ParsedCalls", "find_calls", "form_of_template"]


class _Form(Protocol):
    @property
    def MARKS(self) -> tuple[str, ...]: ...

    def is_in(self, template: str) -> bool: ...

    def find_calls(self, text: str, functions: Functions) -> ParsedCalls | None: ...


# The first that is in a template: Qwen3-Coder's has the marks of Hermes, too, and Llama 4's those of Llama 3.
_FORMS: Mapping[str, _Form] = {
    "gpt_oss": gpt_oss,
    "mistral": mistral,
    "qwen3_coder": qwen3_coder,
    "hermes": hermes,
    "pythonic": pythonic,
    "llama3_json": llama3_json,
}
# vLLM's names for the same forms.
_ALIASES = {
    "openai": "gpt_oss",
    "qwen3_xml": "qwen3_coder",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
}
FORMS = (*_FORMS, *_ALIASES)
"""What `--tool-parser` takes besides auto and none."""

REQUIRED = "json_list"
"""The form of rows that must call a tool, whatever the model's own is."""

NAMED = "arguments:"
"""In front of a function's name, the form of rows that must call this function: all of the text is its arguments."""


@lru_cache(64)
def form_of_template(template: str) -> str | None:
    """The form in which a chat template writes calls; None: none of these."""
    return next((name for name, form in _FORMS.items() if form.is_in(template)), None)


def resolve(name: str) -> str:
    """The name of a form that `--tool-parser` calls by any of its names."""
    return _ALIASES.get(name, name)


def find_calls(form: str, text: str, functions: Functions) -> ParsedCalls | None:
    """The calls in a text behind any thinking; None: there are none, or one of them cannot be read."""
    if form.startswith(NAMED):
        return ParsedCalls("", [Call(form.removeprefix(NAMED), text)]) if text.strip() else None
    return _find(form).find_calls(text, functions)


def marks_of(form: str) -> tuple[str, ...]:
    """The marks around calls, which may be special tokens."""
    return () if form.startswith(NAMED) else _find(form).MARKS


def _find(form: str) -> _Form:
    return json_list if form == REQUIRED else _FORMS[form]
