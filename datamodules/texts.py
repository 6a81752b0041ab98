"""Plain texts from files."""

from __future__ import annotations

import json
from pathlib import Path

KINDS = (".txt", ".json", ".jsonl", ".parquet")
FIELDS = ("text", "Text", "content")


def read_texts(path: Path) -> list[str]:
    """Read texts.

    Args:
        path: A text file, a paragraph a line; a JSON array or JSON lines, of texts or of objects with ``text``; or a Parquet file with that
            column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no texts; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of texts {path}; give one that ends in {', '.join(KINDS)}")
    if path.suffix == ".parquet":
        texts = _of_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        texts = _of_json(path)
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def _of_json(path: Path) -> list[str]:
    content = path.read_text(encoding="utf-8")
    try:
        entries = json.loads(content) if path.suffix == ".json" else [json.loads(line) for line in content.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected an array, got {type(entries).__name__}")
    texts = []
    for number, entry in enumerate(entries):
        found = entry if isinstance(entry, str) else next((entry[name] for name in FIELDS if isinstance(entry, dict) and name in entry), None)
        if not isinstance(found, str):
            raise ValueError(f"{path}, entry {number}: expected a text or an object with one of {', '.join(FIELDS)}, got {entry!r:.80}")
        texts.append(found)
    return texts


def _of_parquet(path: Path) -> list[str]:
    import pyarrow.parquet as parquet

    names = parquet.read_schema(path).names
    name = next((name for name in FIELDS if name in names), None)
    if name is None:
        raise ValueError(f"{path} has no column {' or '.join(FIELDS)}; it has {', '.join(names)}")
    return [text for text in parquet.read_table(path, columns=[name])[name].to_pylist() if text]
