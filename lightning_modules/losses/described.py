"""Objects that a checkpoint can describe by their class and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from torch import nn


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
