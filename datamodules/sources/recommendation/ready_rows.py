"""Readers for data sets with a fixed split: files of the splits, rows and titles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import read_json, read_json_rows
from malleable.datamodules.recommendation.titles import clean_title

Value = TypeVar("Value")

SPLIT_FILES = {
    "train": ("train.json", "train.jsonl", "train_seq.jsonl"),
    "val": ("val.json", "val.jsonl", "valid.json", "valid.jsonl"),
    "test": ("test.json", "test.jsonl"),
}


class TitleIndex:
    """Lookup of titles, unchanged or cleaned.

    Args:
        names: Titles; the methods return their positions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        numbered = list(enumerate(names))[::-1]
        self.positions = {clean_title(name): position for position, name in numbered} | {name: position for position, name in numbered}

    def position(self, name: str) -> int:
        """Return the position of a title; -1 if there is none."""
        position = self.positions.get(name)
        return position if position is not None else self.positions.get(clean_title(name), -1)


def split_files(folder: Path) -> dict[str, Path]:
    """Find the file of each split.

    Raises:
        FileNotFoundError: If there is no file of any split.
    """
    found = {}
    for split, names in SPLIT_FILES.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if paths:
            found[split] = paths[0]
    if not found:
        raise FileNotFoundError(f"{folder} contains no rows; expected files such as {', '.join(names[0] for names in SPLIT_FILES.values())}")
    return found


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """Return place and value of each row of a JSON array or of JSON lines; see :func:`~malleable.datamodules.files.text_files.read_json_rows`."""
    return [(row.place, row.value) for row in read_json_rows(path)]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        ValueError: If the file contains another JSON value.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {brief_repr(content)}; give the file as its authors distribute it")
    return content


def read_field(place: str, read: Callable[[Any, str], Value], row: Any, name: str) -> Value:
    """Read a field of a row; errors contain the place of the row.

    Args:
        place: File and line or entry.
        read: Function that reads a field, such as :func:`~malleable.datamodules.files.text_files.text_of`.
        row: The row.
        name: Name of the field.

    Raises:
        ValueError: If the row has no such field, or if the field has another type.
    """
    try:
        return read(row, name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
