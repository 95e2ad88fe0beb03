"""JSON schemas drawn from seeds: each has a theme, one keyword or shape that it surely holds, and others by chance.

Texts, lists and objects are bounded, so that most rows end by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "age", "city", "price", "kind", "score", "items", "date", "state", "code", "author", "year")
FOREIGN = ("größe", "名前", "città", "название", "naïve ☕", 'a "b"', "c\\d", "ключ 1", "😀")
TEXTS = ("red", "green", "dark blue", "élan", "東京", "Привет", "smile 😀", 'say "hi"', "a/b\\c", "tab\there", "")
PATTERNS = (
    "^[A-Z]{2}-[0-9]{3}$",
    "^(foo|bar)+$",
    "^[a-z]+@[a-z]{2,8}\\.(com|org)$",
    "^[а-я]{2,6}$",
    "^\\d{1,3}(,\\d{3}){0,2}$",
    "^#[0-9a-fA-F]{6}$",
    '^[^"\\\\]{1,5}!$',
    "^v\\d+\\.\\d+(-rc[1-9])?$",
)
FORMATS = ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname")
THEMES = (
    "nested",
    "enums",
    "arrays",
    "refs",
    "recursion",
    "anyOf",
    "oneOf",
    "unicode",
    "patterns",
    "formats",
    "numbers",
    "const",
    "additional",
    "optional",
    "types",
    "tuples",
)


def draw(seed: int) -> tuple[str, Schema]:
    """The theme of a seed and its schema."""
    theme = THEMES[seed % len(THEMES)]
    return theme, _Drawing(seed).schema(theme)


class _Drawing:
    def __init__(self, seed: int) -> None:
        self._source = random.Random(f"schema {seed}")
        self._definitions: dict[str, Schema] = {}

    def schema(self, theme: str) -> Schema:
        themed: Callable[[], Schema] = getattr(self, f"_{theme}")
        others = [self._value(1) for _ in range(self._source.randrange(3))]
        values = [themed(), *others]
        self._source.shuffle(values)
        drawn = self._object(values, FOREIGN if theme == "unicode" else WORDS)
        if theme == "optional":
            drawn["required"] = drawn["required"][: self._source.randrange(2)]
        if self._definitions:
            drawn["$defs"] = self._definitions
        return drawn

    def _object(self, values: Sequence[Schema], words: Sequence[str] = WORDS) -> Schema:
        names = self._source.sample(words, len(values))
        properties = dict(zip(names, values, strict=True))
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    def _value(self, depth: int) -> Schema:
        """A small schema; at depth 0 one without others inside."""
        simple = [self._text, self._enums, self._numbers, self._patterns, self._formats, self._const, self._types]
        deep = [self._nested, self._arrays, self._refs, self._anyOf, self._oneOf, self._tuples]
        made: Schema = self._source.choice(simple + deep if depth else simple)()
        return made

    def _simple(self) -> Schema:
        return self._value(0)

    def _text(self) -> Schema:
        least = self._source.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self._source.randrange(1, 12)}

    def _enums(self) -> Schema:
        values: list[Any] = [*self._source.sample(TEXTS, self._source.randrange(1, 5))]
        if self._source.random() < 0.3:
            values += self._source.sample((1, 2.5, -3, None, True), 2)
        return {"enum": values}

    def _numbers(self) -> Schema:
        low = self._source.randrange(-50, 50)
        high = low + self._source.choice((1, 3, 10, 1000))
        kind = self._source.choice(("integer", "number"))
        bounds: tuple[Schema, ...] = (
            {"minimum": low, "maximum": high},
            {"exclusiveMinimum": low, "exclusiveMaximum": high + 1},
            {"minimum": low + 0.5, "maximum": high + 0.75},
            {"minimum": 0, "maximum": 100, "multipleOf": self._source.choice((2, 5, 25))},
        )
        return {"type": kind, **self._source.choice(bounds)}

    def _patterns(self) -> Schema:
        return {"type": "string", "pattern": self._source.choice(PATTERNS), "maxLength": 20}

    def _formats(self) -> Schema:
        return {"type": "string", "format": self._source.choice(FORMATS)}

    def _const(self) -> Schema:
        constants: tuple[Any, ...] = (7, "ünïcode", None, False, -0.5, ["a", 1], {"k": "v", "l": [True]}, "")
        return {"const": self._source.choice(constants)}

    def _types(self) -> Schema:
        pairs = (["integer", "null"], ["boolean", "null"], ["boolean", "integer"], ["null"])
        return {"type": self._source.choice(pairs)}

    def _unicode(self) -> Schema:
        return self._object([self._enums(), self._simple()], FOREIGN)

    def _nested(self) -> Schema:
        inner = self._object([self._simple() for _ in range(self._source.randrange(1, 3))])
        for _ in range(self._source.randrange(3)):
            inner = self._object([inner])
        return inner

    def _arrays(self) -> Schema:
        least = self._source.randrange(3)
        items = self._source.choice((self._simple, self._simple, lambda: self._object([self._simple()])))()
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + self._source.randrange(3)}

    def _tuples(self) -> Schema:
        items = [self._simple() for _ in range(self._source.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _refs(self) -> Schema:
        name = self._source.choice(("part", "a/b", "größe", "x~y"))
        self._definitions.setdefault(name, self._source.choice((self._simple, self._nested))())
        pointer = name.replace("~", "~0").replace("/", "~1").replace("ö", "%C3%B6").replace("ß", "%C3%9F")
        return {"$ref": f"#/$defs/{pointer}"}

    def _recursion(self) -> Schema:
        own = {"$ref": "#/$defs/node"}
        lists = {"type": "array", "items": own, "maxItems": 1}
        next_one = self._source.choice((lists, {"anyOf": [own, {"type": "null"}]}))
        self._definitions["node"] = self._object([self._enums(), next_one])
        return own

    def _anyOf(self) -> Schema:
        return {"anyOf": [self._simple() for _ in range(self._source.randrange(2, 4))]}

    def _oneOf(self) -> Schema:
        """Of kinds that do not overlap, or of objects that a constant tells apart."""
        if self._source.random() < 0.5:
            return {"oneOf": [self._text(), {"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]}
        tagged = []
        for tag in ("cat", "dog"):
            drawn = self._object([self._simple()])
            drawn["properties"] = {"is": {"const": tag}, **drawn["properties"]}
            drawn["required"] = [*drawn["required"], "is"]
            tagged.append(drawn)
        return {"oneOf": tagged}

    def _additional(self) -> Schema:
        """Properties whose names are the model's choice."""
        more = self._source.choice(({"type": "integer"}, {"enum": ["a", "b"]}, {"type": "boolean"}, True))
        return self._object([self._simple()]) | {"additionalProperties": more}

    def _optional(self) -> Schema:
        return self._object([self._simple(), self._simple(), self._simple()]) | {"required": []}
