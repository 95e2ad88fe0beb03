"""Rows whose text must follow a JSON schema, judged by `jsonschema`: see `scripts/schemas`."""
