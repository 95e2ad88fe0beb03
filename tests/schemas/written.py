"""JSON schemas written by hand: what people send, and what is easily got wrong. And some that cannot be enforced."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_SHORT = {"type": "string", "maxLength": 12}


def _strict(properties: dict[str, Any]) -> Schema:
    """An object of just these properties, as OpenAI's strict mode wants it."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


WRITTEN: dict[str, Schema] = {
    "person": _strict({"name": _SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 130}}),
    "review": _strict(
        {
            "sentiment": {"enum": ["positive", "neutral", "negative"]},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "topics": {"type": "array", "items": {"enum": ["price", "quality", "service"]}, "maxItems": 2},
        }
    ),
    "invoice": _strict(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "due": {"type": "string", "format": "date"},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": _strict({"text": _SHORT, "cents": {"type": "integer", "minimum": 1, "maximum": 99999}}),
            },
        }
    ),
    "judge": _strict({"reason": {"type": "string", "maxLength": 30}, "verdict": {"enum": ["A", "B", "tie"]}}),
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": _strict(
                {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                }
            )
        },
    },
    "linked list": _strict({"head": {"enum": [1, 2]}, "tail": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
    "mutual recursion": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": _strict({"b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}}),
            "b": _strict({"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}),
        },
    },
    "expression": {
        "$ref": "#/definitions/term",
        "definitions": {
            "term": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 9},
                    _strict({"plus": {"type": "array", "items": {"$ref": "#/definitions/term"}, "maxItems": 2}}),
                ]
            }
        },
    },
    "point": _strict(
        {
            "type": {"const": "Point"},
            "coordinates": {
                "type": "array",
                "prefixItems": [
                    {"type": "number", "minimum": -180, "maximum": 180},
                    {"type": "number", "minimum": -90, "maximum": 90},
                ],
                "minItems": 2,
                "maxItems": 2,
                "items": False,
            },
        }
    ),
    "patch": {
        "type": "array",
        "minItems": 1,
        "maxItems": 2,
        "items": {
            "oneOf": [
                _strict({"op": {"const": "add"}, "path": {"type": "string", "pattern": "^(/[a-z]{1,4}){1,3}$"}}),
                _strict({"op": {"const": "remove"}, "path": {"type": "string", "pattern": "^(/[a-z]{1,4}){1,3}$"}}),
            ]
        },
    },
    "array alone": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "text alone": {"type": "string", "minLength": 3, "maxLength": 20},
    "number alone": {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    "enum alone": {"enum": ["Zürich", "München", "東京", "\u2028", "\\", '"', 3, 3.5, None, {"a": []}]},
    "const object": {"const": {"ключ": ["значение", 1.5, {"😀": None}]}},
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "empty array": {"type": "array", "maxItems": 0},
    "keys to escape": _strict(
        {'a"b': {"enum": [1, 2]}, "c\\d": {"enum": [3]}, "e\nf": {"const": "g\th"}, "": {"const": 0}}
    ),
    "keys of other scripts": _strict({"имя": _SHORT, "年齢": {"type": "integer", "minimum": 1, "maximum": 99}}),
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,4}$": {"type": "integer", "minimum": 0, "maximum": 9}},
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "null"}, "maxItems": 1}},
    "some required": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
        "required": ["c"],
        "additionalProperties": False,
    },
    "required and not described": {"type": "object", "required": ["answer"], "additionalProperties": {"enum": [1, 2]}},
    "false property": {"type": "object", "properties": {"a": {"enum": [1]}, "b": False}, "required": ["a"]},
    "nullable": _strict({"middle": {"type": ["string", "null"], "maxLength": 8}, "last": _SHORT}),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 5, "maximum": 20}, "b": {"enum": ["x", "y"]}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "ref with others beside": _strict({"n": {"$ref": "#/$defs/n", "maximum": 12}})
    | {"$defs": {"n": {"type": "integer", "minimum": 10}}},
    "any of objects": {"anyOf": [_strict({"yes": {"const": True}}), _strict({"no": {"const": False}, "why": _SHORT})]},
    "any of with common keys": {
        "anyOf": [
            _strict({"kind": {"const": "a"}, "size": {"type": "integer", "minimum": 0, "maximum": 9}}),
            _strict({"kind": {"const": "b"}, "size": {"type": "string", "maxLength": 4}}),
        ]
    },
    "large numbers": _strict({"id": {"type": "integer", "minimum": 10**12, "maximum": 10**12 + 999}}),
    "negative range": _strict({"celsius": {"type": "number", "minimum": -12.5, "maximum": -0.25}}),
    "multiples": _strict({"dozen": {"type": "integer", "multipleOf": 12, "minimum": 12, "maximum": 144}}),
    "one text": _strict({"exactly": {"type": "string", "minLength": 5, "maxLength": 5}}),
    "moments": _strict(
        {
            "day": {"type": "string", "format": "date"},
            "hour": {"type": "string", "format": "time"},
            "both": {"type": "string", "format": "date-time"},
        }
    ),
    "addresses": _strict({"v4": {"type": "string", "format": "ipv4"}, "v6": {"type": "string", "format": "ipv6"}}),
    "identity": _strict({"id": {"type": "string", "format": "uuid"}, "mail": {"type": "string", "format": "email"}}),
    "pattern in the middle": _strict({"text": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 10}}),
    "pattern with a quote": _strict({"text": {"type": "string", "pattern": '^"[a-c]{2}\\\\"$'}}),
    "annotations": _strict(
        {"a": {"title": "A", "description": "Of a.", "default": 1, "examples": [2], "enum": [1, 2]}}
    ),
    "nested five deep": _strict({"a": _strict({"b": _strict({"c": _strict({"d": _strict({"e": {"const": 1}})})})})}),
    "matrix": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 3, "maxItems": 3},
    },
    "without white space": _strict({"a": {"enum": [1, 2]}, "b": _SHORT})
    | {"x-guidance": {"whitespace_flexible": False}},
    "draft 7": {"$schema": "http://json-schema.org/draft-07/schema#"} | _strict({"a": {"enum": ["x"]}, "b": _SHORT}),
}

REFUSED: dict[str, Schema] = {
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "oneOf": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
    "format": {"type": "string", "format": "credit-card"},
    "look-around": {"type": "string", "pattern": "^(?!a)[a-z]+$"},
    "http://example.org/other.json": {"$ref": "http://example.org/other.json"},
}
"""By what the sentence must name."""
