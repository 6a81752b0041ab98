"""Public names that are imported when first used, so that the package and its command line start quickly."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package export, lazily, what the stub beside its ``__init__.py`` imports.

    The stub is the one list of exports: type checkers and editors read it as it stands, and here it is read as data.

    Args:
        package: The package's ``__name__``.
        file: The package's ``__file__``.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` of the package.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    names = sorted(homes)
    return getattribute, lambda: names, names
