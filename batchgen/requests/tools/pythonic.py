"""`[f(a=1), g(b="x")]`, a list of calls in Python's notation: Llama 3.2 and 4.

Nothing is evaluated: arguments are literals, read off Python's syntax tree. No mark tells such a call from an answer,
so the whole text must be calls, and of functions that the row offers.
"""

from __future__ import annotations

import ast
import json
import warnings

from batchgen.requests.tools._form import Call, Functions, ParsedCalls

MARKS: tuple[str, ...] = ("<|python_start|>", "<|python_end|>")
_JSON_NAMES = {"true": True, "false": False, "null": None}  # which models write for Python's
_MOST_CHARACTERS = 1_000_000  # of calls that are read: Python's parser takes much memory


def is_in(template: str) -> bool:
    """Whether a chat template writes calls in this form."""
    return MARKS[0] in template or "[func_name1(" in template


def find_calls(text: str, functions: Functions) -> ParsedCalls | None:
    """The calls that `text` is; None: it is something else."""
    whole = text.strip().removeprefix(MARKS[0]).removesuffix(MARKS[1]).strip()
    if not (whole.startswith("[") and whole.endswith("]")) or len(whole) > _MOST_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(whole, mode="eval").body
        calls = [_call(node) for node in tree.elts] if isinstance(tree, ast.List) else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # whatever Python's parser says of any text
        return None
    return ParsedCalls("", calls) if calls and all(call.name in functions for call in calls) else None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("this is no call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("an argument has no name")
        arguments[keyword.arg] = _literal(keyword.value)
    return Call(_name(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("this is no name of a function")
    return node.id


def _literal(node: ast.expr) -> object:
    """The value of a literal that JSON has, too."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number
    raise ValueError("this is no literal of JSON")


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("a key is no text")
    return node.value
