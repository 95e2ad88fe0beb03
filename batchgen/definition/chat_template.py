"""The chat template of a model folder: in the tokenizer's config, or in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from batchgen.definition.errors import ModelError, one_line
from batchgen.definition.files import read_json

_FIELD = "chat_template"
_DEFAULT = "default"


def use_chat_template(folder: Path, tokenizer: Any) -> None:
    """Gives the tokenizer the template in `chat_template.json`, where processors keep it, if it has none; checks it.

    Raises:
        ModelError: it is no Jinja template, nor several with their names; a sentence that names the file.
    """
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = (read_json(folder / name) or {}).get(_FIELD)
        if given is not None:
            templates = read_templates(given, f"{folder / name}: {_FIELD}")
            alone = templates[_DEFAULT] if [*templates] == [_DEFAULT] else templates
            tokenizer.chat_template = tokenizer.chat_template or alone
    if tokenizer.chat_template:
        _check_syntax(folder, tokenizer)


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


def _check_syntax(folder: Path, tokenizer: Any) -> None:
    """Whether the chat template is a Jinja template; it is not run."""
    file = next((name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).exists()), None)
    where = f"the chat template of the model ({folder / (file or 'tokenizer_config.json')})"
    given = tokenizer.chat_template
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
