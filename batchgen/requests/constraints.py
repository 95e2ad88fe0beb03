"""What a text must be: a JSON schema, a regular expression, one of several texts, or a grammar.

What cannot be enforced is refused here, before a model sees the row: llguidance names it when it compiles. It is
imported when the first constraint is read. `openai_constraints` reads the ways in which a body says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast, get_args

from batchgen.requests.refusal import Refused, quote
from batchgen.types import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"[ \n\r\t]{1,25}"
"""What may stand between two tokens of JSON, besides nothing: a line end and six levels of four spaces at the most.

Models can go on with white space for ever; so every place has an end.
"""

ANY_OBJECT = Constraint("json_schema", '{"type": "object"}')
"""Any JSON object, as `response_format` of type `json_object` asks for."""

KINDS: Sequence[ConstraintKind] = get_args(ConstraintKind)
"""The keys of a plain row that say what its text must be."""

_OPTIONS = "x-guidance"  # where llguidance finds options in a schema
_NOUNS = {"json_schema": "schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}


def read_constraint(kind: ConstraintKind, value: object, name: str) -> Constraint:
    """The constraint of this kind, checked.

    Args:
        value: a schema as an object, true or JSON text; a regular expression or a grammar as a text; choices as a list
            of texts.
        name: what the row calls it, for sentences.

    Raises:
        Refused: it is of another type (wrong_type), or cannot be enforced (constraint).
    """
    if kind == "json_schema":
        return read_schema(value, name, {})
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise Refused("wrong_type", f"{name} must be a list of texts, none of them empty, not {quote(value)}")
        text = json.dumps(list(dict.fromkeys(value)), ensure_ascii=False)
    elif isinstance(value, str) and value:
        text = value
    else:
        raise Refused("wrong_type", f"{name} must be a text that is not empty, not {quote(value)}")
    return _checked(Constraint(kind, text), name)


def read_schema(value: object, name: str, options: Mapping[str, object]) -> Constraint:
    """The constraint by a JSON schema, checked; its keys stay in their order, which is that of the text's.

    Args:
        value: the schema as an object, true or JSON text.
        options: llguidance's, beside the schema's own: `whitespace_flexible`, `whitespace_pattern`.

    Raises:
        Refused: it is no schema (wrong_type), or cannot be enforced (constraint).
    """
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Refused("wrong_type", f"{name} is no JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise Refused("wrong_type", f"{name} must be a JSON schema, an object or its JSON text, not {quote(value)}")
    if options:
        own = schema.get(_OPTIONS)
        schema = {**schema, _OPTIONS: {**(own if isinstance(own, Mapping) else {}), **options}}
    elif isinstance(value, str) and value.lstrip().startswith("{"):
        return _checked(Constraint("json_schema", value), name)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date of a table, or an infinity
        raise Refused("wrong_type", f"{name} is no JSON schema: {error}. Write it as JSON text") from None
    return _checked(Constraint("json_schema", text), name)


def check(constraint: Constraint) -> None:
    """Checks that the constraint can be enforced.

    Raises:
        ValueError: it cannot; a sentence about the schema, the regular expression or the grammar that says why.
    """
    if problem := _find_problem(constraint):
        raise ValueError(problem)


def _checked(constraint: Constraint, name: str) -> Constraint:
    if problem := _find_problem(constraint):
        raise Refused("constraint", f"{name}: {problem}")
    return constraint


def make_grammar(constraint: Constraint) -> str:
    """The constraint as a grammar for `llguidance.LLMatcher`.

    White space in JSON is bounded (`WHITESPACE`), unless the schema's own `x-guidance` says something of it. A regular
    expression matches the text as a whole.

    Raises:
        ValueError: it is none; a sentence, or llguidance's words.
    """
    from llguidance import LLMatcher, grammar_from

    if constraint.kind != "json_schema":
        return grammar_from(constraint.kind, constraint.text)
    options = json.loads(constraint.text).get(_OPTIONS)
    if not isinstance(options, Mapping | None):
        raise ValueError(f"{_OPTIONS} must be an object")
    says_whitespace = bool({"whitespace_flexible", "whitespace_pattern"} & set(options or ()))
    defaults = {} if says_whitespace else {"whitespace_pattern": WHITESPACE}
    # What is lenient leaves out what cannot be enforced, without a word.
    return LLMatcher.grammar_from_json_schema(
        constraint.text,
        defaults=cast("JsonCompileOptions", defaults),
        overrides=cast("JsonCompileOptions", {"lenient": False}),
    )


@lru_cache(maxsize=4096)
def _find_problem(constraint: Constraint) -> str:
    """Why the constraint cannot be enforced; "" if it can. Once for each, however many rows have it."""
    from llguidance import LLMatcher

    try:
        problem = LLMatcher.validate_grammar(make_grammar(constraint))
    except BaseException as error:  # what Rust panics with is no Exception
        if not isinstance(error, (ValueError, RecursionError)) and type(error).__name__ != "PanicException":
            raise
        problem = str(error) or type(error).__name__
    if not problem:
        return ""
    noun = _NOUNS[constraint.kind]
    if keys := re.match(r"Unimplemented keys: (\[.*\])", problem):
        names: list[str] = json.loads(keys[1])
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"the {noun} uses {listed}, which cannot be enforced; leave {'them' if len(names) > 1 else 'it'} out"
    return f"the {noun} cannot be enforced: {_brief(problem)}"


def _brief(problem: str) -> str:
    """llguidance's words on one line: what is wrong, and the line and column of a grammar."""
    first, *others = (line.strip() for line in problem.splitlines())
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", first)
    reason = next((line.removeprefix("error: ") for line in others if line.startswith("error: ")), None)
    if reason is None:
        reason = first[place.end() :] if place else first
        where = f"line {place[1]}, column {place[2]}: " if place else ""
        return where + reason[:300]
    return reason[:300]
