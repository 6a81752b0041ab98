"""YAML that a user gives: recipes, and configurations stored beside checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from malleable.datamodules.files.text_files import open_text
from malleable.datamodules.files.user_files import check_file, first_line

SIZE_LIMIT = 1 << 22
"""Bytes of a YAML file, at most."""
DEPTH_LIMIT = 64
"""Lists and mappings within each other, at most."""
NODES_LIMIT = 100_000
"""Values of a YAML file, those that aliases repeat counted each time, at most."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that is a mapping, or empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML or no mapping, or beyond the limits; with file, line and column.
    """
    check_file(path, "give a YAML file, or the name of a recipe")
    with open_text(path, line_limit=SIZE_LIMIT) as file:
        text = file.read(SIZE_LIMIT + 1)
        if file.encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"{path} is in {file.encoding.upper()}; save it as UTF-8")
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"{path} is larger than {SIZE_LIMIT >> 20} MiB; is it a configuration?")
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} holds a {type(content).__name__}; a configuration is a mapping with keys such as `model` and `data`")
    return content or {}


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML; aliases that repeat values without end are refused.

    Args:
        text: The text.
        place: Where it stands, for messages.

    Raises:
        ValueError: If it is no YAML, or beyond the limits.
    """
    import yaml

    try:
        content = yaml.load(text, _loader())
        _check_size(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{place}{at}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    except (RecursionError, ValueError, TypeError, OverflowError, AttributeError) as error:  # nesting, odd dates and numbers, unhashable keys
        raise ValueError(f"{place}: not YAML that can be read: {first_line(error)}") from error
    return content


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, without merges (``<<``) of merges that double the number of keys time and again."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            if len(node.value) > NODES_LIMIT:
                raise ValueError(f"more than {NODES_LIMIT} keys in one mapping, merged ones among them")

    return Loader


def _check_size(content: Any) -> None:
    """Count values level by level; an alias counts as its value."""
    level, count = [content], 0
    for _ in range(DEPTH_LIMIT):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                following += value.values() if isinstance(value, dict) else value
            if count + len(following) > NODES_LIMIT:
                raise ValueError(f"more than {NODES_LIMIT} values, those that aliases repeat among them; is it a configuration?")
        count += len(following)
        level = following
        if not level:
            return
    raise ValueError(f"lists and mappings are nested more than {DEPTH_LIMIT} deep")
