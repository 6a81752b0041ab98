"""Manifest of a patch: a JSON file with sorted keys, whose fields are checked when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import parse_json

FORMAT = 1
_FIELDS: dict[str, type] = {
    "id": str,
    "kind": str,
    "created": str,
    "title": str,
    "requests": list,
    "settings": dict,
    "figures": dict,
    "base": dict,
    "requires": list,
    "tensors": dict,
    "libraries": dict,
}
# Names of these types in messages about JSON.
_TYPE_NAMES: dict[type, str] = {str: "string", list: "array", dict: "object"}


def to_json_types(value: Any, what: str) -> Any:
    """Convert a value to JSON types: tuples to lists, nan and infinite numbers to ``None``.

    Raises:
        ValueError: If JSON cannot represent the value; the message begins with ``what``.
    """
    try:
        return _finite(json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be plain data (dictionaries, lists, strings, numbers): {error}") from error


def to_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def dump_manifest(fields: Mapping[str, Any]) -> str:
    """Return the text of ``patch.json``."""
    return json.dumps({"format": FORMAT, **fields}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str) -> dict[str, Any]:
    """Parse a manifest, and return its fields.

    Raises:
        ValueError: If the text is not JSON, has another format version, or a field is missing or has a wrong type.
    """
    fields = parse_json(text, "it is not JSON")
    if not isinstance(fields, dict):
        raise ValueError(f"a manifest must be a JSON object, got {brief_repr(fields, 60)}; copy the patch again")
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"format version {fields.get('format')!r} is not supported, only {FORMAT}; use the version of malleable that wrote the patch"
        )
    for name, kind in _FIELDS.items():
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; copy the patch again")
        if not isinstance(fields[name], kind):
            raise ValueError(f"field {name!r} must be a JSON {_TYPE_NAMES[kind]}, got {brief_repr(fields[name], 60)}; copy the patch again")
    _check_contents(fields)
    return fields


def _check_contents(fields: Mapping[str, Any]) -> None:
    for name, item in (*(("requests", item) for item in fields["requests"]), *fields["figures"].items(), *fields["tensors"].items()):
        if not isinstance(item, dict):
            raise ValueError(f"{name!r}: expected a JSON object, got {brief_repr(item, 60)}; copy the patch again")
    for name, item in (*(("requires", item) for item in fields["requires"]), *fields["base"].items(), *fields["libraries"].items()):
        if not isinstance(item, str):
            raise ValueError(f"{name!r}: expected a JSON string, got {brief_repr(item, 60)}; copy the patch again")
    try:
        datetime.fromisoformat(fields["created"])
    except ValueError as error:
        given = brief_repr(fields["created"], 60)
        raise ValueError(f"'created' must be a time like 2026-01-31T12:00:00+00:00, got {given}; copy the patch again") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
