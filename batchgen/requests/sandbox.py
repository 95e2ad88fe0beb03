"""Jinja's sandbox for `--template`, with an end: a row may ask for a loop or a text that no machine has room for.

Templates cannot reach Python's insides or change a row, and give the same text every time. What could take for ever or
all memory is counted or measured before it is done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchgen.requests.refusal import Refused

MOST_STEPS = 1_000_000  # in one row: turns of loops, and calls, which take as long as ten turns; about a second
MOST_TEXT = 100_000_000  # characters of a prompt: several times what any model reads
_MOST_WIDTH = 1_000_000  # that a text may be filled up to
_MOST_BITS = 10_000  # of a power
# Widths and precisions of formats; `*` takes one from the values.
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*\d*\.?(?:\*|\d{7})")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*\d{7}")

_FILLING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})  # methods of texts
_REPEATING = ("batch", "center", "format", "indent", "slice")  # filters


class _Counting(CodeGenerator):
    """Sends what loops go over, and texts that are put together with `~`, through the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = self._through("counted", [node.iter], node)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(self._through("joined", node.nodes, node), frame)

    def _through(self, name: str, given: Sequence[Any], node: nodes.Node) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(given), [], None, None, lineno=node.lineno)
        call.set_environment(self.environment)
        return call


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    code_generator_class = _Counting
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalized)
        # A resumed run must render the same prompts.
        del self.globals["lipsum"], self.filters["random"]
        self.filters |= {name: _narrow(self.filters[name]) for name in _REPEATING}
        self._steps = 0

    def text_of(self, template: Template, columns: Mapping[str, object]) -> str:
        """The rendered text. Raises Refused, and whatever an expression over the row's values raises."""
        self._steps = 0
        pieces, length = [], 0
        for piece in template.generate(columns):
            length += len(piece)
            _check_length(length)
            pieces.append(piece)
        return "".join(pieces)

    def counted(self, items: Iterable[object]) -> Iterator[object]:
        """`items`, each of which is a step."""
        for item in items:
            self._step()
            yield item

    def joined(self, *parts: object) -> str:
        """The parts as one text."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in the template: of a macro, a method, or a loop that goes down into itself."""
        self._step(10)
        if isinstance(obj, LoopContext) and args:
            args = (self.counted(args[0]), *args[1:])
        elif getattr(obj, "__name__", "") in _FILLING:
            _check_widths(args)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's `format`, for the sandbox to carry out."""
        safe = super().wrap_str_format(value)
        if safe is not None:
            _check_format(value.__self__, _WIDE_BRACES)
        return safe

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make much of little."""
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MOST_BITS:
                raise Refused("template", f"the template failed: a power has more than {_MOST_BITS} bits")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                    _check_length(len(sequence) * times)
        elif operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _check_length(len(left) + len(right))
        elif isinstance(left, str):
            _check_format(left, _WIDE_PERCENT)
        return super().call_binop(context, operator, left, right)

    def _step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > MOST_STEPS:
            raise Refused("template", f"the template failed: it takes more than {MOST_STEPS} steps for this row")


def _finalized(value: object) -> object:
    if value is None:
        raise Refused("template", "the template failed: it writes a column that is null")
    return value


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which refuses large numbers and wide formats."""

    @wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        _check_widths([*args, *kwargs.values()])
        if function.__name__ == "do_format":
            _check_format(str(args[0]), _WIDE_PERCENT)
        return function(*args, **kwargs)

    return narrow


def _check_length(length: int) -> None:
    if length > MOST_TEXT:
        raise Refused("template", f"the template failed: it makes a text of more than {MOST_TEXT} characters")


def _check_widths(given: Iterable[object]) -> None:
    if any(isinstance(number, int) and number > _MOST_WIDTH for number in given):
        raise Refused("template", f"the template failed: it fills a text up to more than {_MOST_WIDTH} characters")


def _check_format(text: str, wide: re.Pattern[str]) -> None:
    if wide.search(text):
        raise Refused("template", "the template failed: a format may not have a width of 7 digits, or of *")
