"""Conversion of settings and losses to plain data, which checkpoints store, and back."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from torch import nn


def to_plain(value: Any) -> Any:
    """Convert a dataclass, or an object with ``as_plain``, to a plain dictionary; return other values unchanged."""
    if hasattr(value, "as_plain"):
        return value.as_plain()
    return json.loads(json.dumps(asdict(value))) if is_dataclass(value) and not isinstance(value, type) else value


def from_plain(kind: Any, value: Any) -> Any:
    """Rebuild a dataclass from a plain dictionary; return other values unchanged."""
    if not isinstance(value, Mapping):
        return value
    hints = get_type_hints(kind)
    inner = {f.name: next((t for t in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(t)), None) for f in fields(kind)}
    return kind(**{name: from_plain(inner[name], item) if inner.get(name) else item for name, item in value.items()})


def nested(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name, or ``None`` if a part of the path is missing or ``None``."""
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class SerializableModule(nn.Module):
    """Module that can be rebuilt from its constructor arguments."""

    def as_plain(self) -> dict[str, Any]:
        """Return the class path and the constructor arguments; see :func:`object_from_plain`.

        A subclass must store each constructor argument in an attribute of the same name, or override this method.
        """
        kind = type(self)
        arguments = [name for name in inspect.signature(kind).parameters if hasattr(self, name)]
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {name: getattr(self, name) for name in arguments}}


# Classes in checkpoints of earlier versions, by their names then.
_RENAMED = {"malleable.lightning_modules.losses.preference.SDPO": "malleable.lightning_modules.losses.preference.SoftmaxDPO"}


def object_from_plain(base: type, value: Any) -> Any:
    """Build an object from the output of :meth:`SerializableModule.as_plain`; return instances and ``None`` unchanged.

    Raises:
        TypeError: If the class is not a subclass of ``base``.
    """
    if not isinstance(value, Mapping):
        return value
    path = str(value["class_path"])
    kind = resolve_name(_RENAMED.get(path, path))
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f"the checkpoint names the class {value['class_path']}, which is not a subclass of {base.__name__}; use another checkpoint")
    return kind(**value.get("init_args", {}))
