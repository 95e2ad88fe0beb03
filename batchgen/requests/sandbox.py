"""Jinja's own sandbox for `--template` and for rows' own chat templates, with limits for what a row may ask of it.

The template is written by the person who gives the command, and is trusted to end. The values are the rows': they reach
nothing of Python's insides, change nothing, and no number of theirs may ask for a text that no machine has room for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchgen.requests.refusal import Refused
from batchgen.requests.template import GENERATION_TAGS

MAX_CHARACTERS = 100_000_000  # of a prompt: several times what any model reads
_MAX_WIDTH = 1_000_000  # characters that a text may be filled up to
_MAX_BITS = 10_000  # of a power

_FILLING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # of texts
_FILLING_FILTERS = ("batch", "center", "indent", "slice")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null)
        # A resumed run must render the same prompts.
        del self.globals["lipsum"], self.filters["random"]
        self.filters |= {name: _with_limited_width(self.filters[name]) for name in _FILLING_FILTERS}

    def render(self, template: Template, columns: Mapping[str, object]) -> str:
        """Renders the text of a row.

        Raises:
            Refused: the row asks for too much, or a value of it that is written is null.
            Exception: whatever an expression over the row's values raises.
        """
        pieces, length = [], 0
        for piece in template.generate(columns):
            length += len(piece)
            _check_length(length)
            pieces.append(piece)
        return "".join(pieces)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a method or a function of the template."""
        if getattr(obj, "__name__", "") in _FILLING_METHODS:
            _check_widths(args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator that can make much of little."""
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
                raise Refused("template", f"the template failed: a power has more than {_MAX_BITS} bits")
        else:
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                    _check_length(len(sequence) * times)
        return super().call_binop(context, operator, left, right)


class ChatSandbox(Sandbox):
    """The environment of chat templates that rows bring along, which may use what Transformers gives to models' own.

    A template cannot ask for the time: a resumed run must render the same prompts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.undefined = Undefined
        self.finalize = None
        self.keep_trailing_newline = False
        self.trim_blocks = self.lstrip_blocks = True
        self.add_extension("jinja2.ext.loopcontrols")
        self.filters["tojson"] = _write_json
        self.globals["raise_exception"] = _raise

    def from_chat_template(self, source: str) -> Template:
        """The template that is written `source`; Transformers' marks around what is generated mean nothing here.

        Raises:
            ValueError: it is no Jinja template; a sentence.
        """
        try:
            return self.from_string(GENERATION_TAGS.sub("", source))
        except TemplateSyntaxError as error:
            raise ValueError(f"chat_template is no Jinja template: line {error.lineno}: {error.message}") from error
        except Exception as error:  # nested too deeply for Python, a number of too many digits
            raise ValueError(f"chat_template cannot be used: {' '.join(str(error).split())[:300]}") from error


def _write_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models' own templates get it: nothing is escaped for HTML."""
    if isinstance(indent, int):
        _check_widths([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _refuse_null(value: object) -> object:
    if value is None:
        raise Refused("template", "the template failed: it writes a column that is null")
    return value


def _with_limited_width(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which refuses large numbers."""

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_widths([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return limited


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise Refused("template", f"the template failed: it makes a text of more than {MAX_CHARACTERS} characters")


def _check_widths(arguments: Iterable[object]) -> None:
    if any(isinstance(number, int) and number > _MAX_WIDTH for number in arguments):
        raise Refused("template", f"the template failed: it fills a text up to more than {_MAX_WIDTH} characters")
