"""Remedies for wrong fields of a configuration: they say in words what each field may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def remedy_of(error: ValidationError, model: type[BaseModel], form: str) -> str:
    """Return for every wrong field how it is written and what it may hold.

    Args:
        error: what pydantic found.
        model: the model it was raised for.
        form: how a person writes a field, with `{field}` for its path.
    """
    schema = model.model_json_schema()
    told = (_remedy(schema, item["loc"], form) for item in error.errors())
    return " ".join(dict.fromkeys(told))


def _remedy(schema: Mapping[str, Any], path: Sequence[str | int], form: str) -> str:
    names = [str(step) for step in path]
    node: Mapping[str, Any] = schema
    for depth, step in enumerate(path):
        node, parent = _inner(node, schema, step), node
        if node and not _has_fields(parent, schema) and not _has_fields(node, schema):
            # An element is written with the whole field.
            node, names = parent, names[:depth]
            break
        if not node:
            fields = list(_resolved(parent, schema).get("properties", {}))
            where = ".".join(names[:depth]) or "the top level"
            close = difflib.get_close_matches(names[depth], fields, n=1)
            guess = f", perhaps {close[0]}" if close else ""
            return f"Drop {'.'.join(names)}: {where} has the fields {', '.join(fields)}{guess}."
    fields = list(_resolved(node, schema).get("properties", {}))
    if fields:
        return f"Give {' and '.join(form.format(field='.'.join([*names, each])) for each in fields)}."
    default = f" (default {node['default']!r})" if "default" in node else ""
    return f"Give {form.format(field='.'.join(names))}, {in_words(node, schema)}{default}."


def in_words(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return what a value may be: its type or choices and its bounds, from a part of a JSON schema."""
    node = _resolved(node, schema)
    if "anyOf" in node:
        return " or ".join(in_words(each, schema) for each in node["anyOf"])
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "const" in node:
        return str(node["const"])
    if node.get("format") == "date-time":
        return "a time such as 2026-03-01 or 2026-03-01T12:00:00+00:00"
    kind = node.get("type", "")
    if kind == "array":
        return f"a list such as [A, B], each {in_words(node.get('items', {}), schema)}"
    if kind == "object" and isinstance(node.get("additionalProperties"), Mapping):
        names = node.get("propertyNames")
        keys = f"each key {in_words(names, schema)}, " if names else ""
        return f"a mapping such as {{A: B}}, {keys}each value {in_words(node['additionalProperties'], schema)}"
    bounds = [f"{words} {node[key]}" for key, words in BOUNDS.items() if key in node]
    return " ".join([TYPES.get(kind, "a value"), *([" and ".join(bounds)] if bounds else [])])


def _has_fields(node: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Return whether a node is a section."""
    node = _resolved(node, schema)
    return any("properties" in _resolved(choice, schema) for choice in node.get("anyOf", [node]))


def _inner(node: Mapping[str, Any], schema: Mapping[str, Any], step: str | int) -> Mapping[str, Any]:
    """Return the part of a schema that describes a field or an element; empty where there is none."""
    node = _resolved(node, schema)
    for choice in node.get("anyOf", [node]):
        choice = _resolved(choice, schema)
        found = choice.get("items") if isinstance(step, int) else choice.get("properties", {}).get(step)
        found = found or choice.get("additionalProperties")
        if isinstance(found, Mapping) and found:
            return found
    return {}


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a reference points to, and any other node as it is."""
    reference = node.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node
