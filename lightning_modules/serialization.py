"""Settings and losses as plain data, which a checkpoint may hold, and back."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from torch import nn


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


class Described(nn.Module):
    """A module made of plain arguments."""

    def as_plain(self) -> dict[str, Any]:
        """Describe the object as data that a checkpoint may hold, see :func:`object_from_plain`.

        A subclass with arguments of its own keeps each as an attribute of the same name, or overrides this.
        """
        kind = type(self)
        arguments = [name for name in inspect.signature(kind).parameters if hasattr(self, name)]
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {name: getattr(self, name) for name in arguments}}


def object_from_plain(base: type, value: Any) -> Any:
    """Make the object that :meth:`Described.as_plain` has described; instances and ``None`` pass through.

    Raises:
        TypeError: If the class is no ``base``.
    """
    if not isinstance(value, Mapping):
        return value
    kind = resolve_name(value["class_path"])
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f"the checkpoint names {value['class_path']} as its loss, which is no {base.__name__}")
    return kind(**value.get("init_args", {}))
