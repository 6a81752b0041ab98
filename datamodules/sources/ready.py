"""Reading of formats whose rows come with a ready split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPLIT_FILES = {
    "train": ("train.json", "train.jsonl", "train_seq.jsonl"),
    "val": ("val.json", "val.jsonl", "valid.json", "valid.jsonl"),
    "test": ("test.json", "test.jsonl"),
}


def split_files(folder: Path) -> dict[str, Path]:
    """Find the file of each split.

    Raises:
        FileNotFoundError: If there is none at all.
    """
    found = {}
    for split, names in SPLIT_FILES.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if paths:
            found[split] = paths[0]
    if not found:
        raise FileNotFoundError(f"{folder} holds no rows; expected files such as {', '.join(names[0] for names in SPLIT_FILES.values())}")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list or JSON lines of objects.

    Raises:
        ValueError: If it is neither.
    """
    text = path.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    return rows


def value_of(row: Any, name: str, path: Path, number: int) -> Any:
    """Return a field of a row.

    Raises:
        ValueError: If the row has no such field.
    """
    if not isinstance(row, dict) or name not in row:
        fields = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{path}, row {number}: no field {name!r}; it has {fields}")
    return row[name]
