"""Reader of YAML files: recipes, and configurations stored in run folders."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from malleable.datamodules.files.text_files import open_text
from malleable.datamodules.files.user_files import check_file, first_line

SIZE_LIMIT = 1 << 22
"""Maximum number of bytes of a YAML file."""
DEPTH_LIMIT = 64
"""Maximum nesting of lists and mappings."""
NODES_LIMIT = 100_000
"""Maximum number of values of a YAML file; each use of an alias counts."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping or is empty.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not valid YAML in UTF-8, does not contain a mapping, or exceeds the limits. The message contains file, line and column.
    """
    check_file(path, "give a YAML file, or the name of a recipe")
    with open_text(path, line_limit=SIZE_LIMIT) as file:
        text = file.read(SIZE_LIMIT + 1)
        if file.encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"{path} is encoded in {file.encoding.upper()}; save it as UTF-8")
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"{path} is larger than {SIZE_LIMIT >> 20} MiB; give a configuration file")
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} contains a {type(content).__name__}; a configuration must be a mapping with keys such as `model` and `data`")
    return content or {}


def parse_yaml(text: str, place: str) -> Any:
    """Parse YAML.

    Args:
        text: The text.
        place: File or option, for messages.

    Raises:
        ValueError: If it is not valid YAML, or exceeds the limits, e.g. by aliases that repeat values many times.
    """
    import yaml

    try:
        content = yaml.load(text, _loader())
        _check_size(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{place}{at}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    except (
        RecursionError,
        ValueError,
        TypeError,
        OverflowError,
        AttributeError,
    ) as error:  # nesting, invalid dates and numbers, unhashable keys
        raise ValueError(f"{place}: YAML that cannot be read: {first_line(error)}") from error
    return content


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe loader with a limit on merged keys, because nested merges (``<<``) can double the number of keys at each level."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            if len(node.value) > NODES_LIMIT:
                raise ValueError(f"more than {NODES_LIMIT} keys in one mapping, including merged keys")

    return Loader


def _check_size(content: Any) -> None:
    """Raise an error if there are too many values or levels. Each use of an alias counts."""
    level, count = [content], 0
    for _ in range(DEPTH_LIMIT):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                following += value.values() if isinstance(value, dict) else value
            if count + len(following) > NODES_LIMIT:
                raise ValueError(f"more than {NODES_LIMIT} values, including those repeated by aliases; give a configuration file")
        count += len(following)
        level = following
        if not level:
            return
    raise ValueError(f"lists and mappings are nested more than {DEPTH_LIMIT} deep")
