"""The chat template of a model folder: in the tokenizer's config, or in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from batchgen.models.definition.errors import ModelError, one_line
from batchgen.models.definition.files import read_json

_FIELD = "chat_template"
_DEFAULT = "default"
_MESSAGE = "Name a colour"
_CONFIG, _FILE = "tokenizer_config.json", "chat_template.json"


def read_chat_template(folder: Path) -> str | dict[str, str] | None:
    """The template that stands in `chat_template.json`, where processors keep it; None: there is no such file.

    Several have names. What `tokenizer_config.json` has is looked at, too, since Transformers takes it without a look.

    Raises:
        ModelError: one of the files is damaged, or holds no template; a sentence that names it.
    """
    given = (read_json(folder / _CONFIG) or {}).get(_FIELD)
    if given is not None:
        read_templates(given, f"{folder / _CONFIG}: {_FIELD}")
    values = read_json(folder / _FILE)
    if values is None:
        return None
    templates = read_templates(values.get(_FIELD), f"{folder / _FILE}: {_FIELD}")
    return templates[_DEFAULT] if [*templates] == [_DEFAULT] else templates


def check_chat_template(folder: Path, tokenizer: Any) -> None:
    """Whether each chat template that the tokenizer has is a Jinja template, and writes what the user says.

    Raises:
        ModelError: it is not, or does not; a sentence that names the file.
    """
    given = tokenizer.chat_template
    if not given:
        return
    file = next((name for name in ("chat_template.jinja", _FILE) if (folder / name).exists()), _CONFIG)
    where = f"the chat template of the model ({folder / file})"
    try:
        for template in read_templates(given, where).values():
            render_jinja_template(conversations=[], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"{where} is no Jinja template: line {error.lineno}: {error.message}. Mend it, or copy it again"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # nested too deeply for Python, a number of too many digits
        raise ModelError(f"{where} cannot be used: {one_line(error)}") from error
    if _drops_messages(tokenizer):
        raise ModelError(f"{where} leaves what the user says out of the text; mend it, or copy it again")


def _drops_messages(tokenizer: Any) -> bool:
    """Whether the chat template renders a text without the message, given as a text and given as parts."""
    for content in (_MESSAGE, [{"type": "text", "text": _MESSAGE}]):
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # it wants something else, and says so of each row that lacks it
            return False
        if _MESSAGE in text:
            return False
    return True


def read_templates(given: object, name: str) -> dict[str, str]:
    """Templates by their names, from any of the forms in which files hold them; one without a name is the default.

    Raises:
        ModelError: `name` (for the sentence) is neither.
    """
    if isinstance(given, str):
        given = {_DEFAULT: given}
    if isinstance(given, list) and all(isinstance(one, Mapping) for one in given):
        given = {one.get("name"): one.get("template") for one in given}
    if isinstance(given, Mapping) and given:
        found = {key: text for key, text in given.items() if isinstance(key, str) and isinstance(text, str)}
        if len(found) == len(given):
            return found
    raise ModelError(
        f'{name} must be a Jinja template, or a list of templates, each an object with "name" and "template". Mend the '
        "file, or copy it again from where the model came from"
    )
