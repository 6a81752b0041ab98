"""Settings as plain data, which a checkpoint may hold, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints


def plain(value: Any) -> Any:
    """Turn a dataclass, or an object with ``as_plain``, into the plain dictionary a checkpoint may hold."""
    if hasattr(value, "as_plain"):
        return value.as_plain()
    return json.loads(json.dumps(asdict(value))) if is_dataclass(value) and not isinstance(value, type) else value


def from_plain(kind: Any, value: Any) -> Any:
    """Rebuild a dataclass from the plain dictionary a checkpoint holds; instances and other values pass through."""
    if not isinstance(value, Mapping):
        return value
    hints = get_type_hints(kind)
    inner = {f.name: next((t for t in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(t)), None) for f in fields(kind)}
    return kind(**{name: from_plain(inner[name], item) if inner.get(name) else item for name, item in value.items()})


def nested(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name, ``None`` where a part on the way is missing or ``None``."""
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
