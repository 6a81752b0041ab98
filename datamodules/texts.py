"""Plain texts from files, and documents of them packed into rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from malleable.datamodules.batch import PackedExample
from malleable.datamodules.packing import Window, fit
from malleable.datamodules.splits import Ints

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


class TextRows:
    """Documents packed into rows; longer ones are cut.

    Args:
        documents: Tokens of each.
        pack_length: Tokens of a row.
        first_id: ``sample_id`` of the first row.

    Raises:
        ValueError: If no document has two tokens: there would be nothing to predict.
    """

    def __init__(self, documents: Sequence[Sequence[int]], pack_length: int, first_id: int = 0) -> None:
        parts = [document[start : start + pack_length] for document in documents for start in range(0, len(document), pack_length)]
        self.documents = [part for part in parts if len(part) > 1]
        if not self.documents:
            raise ValueError("there is no text of at least two tokens to make rows of")
        self.rows = fit([Window(number, 0, 1, len(document)) for number, document in enumerate(self.documents)], pack_length)
        self.first_id = first_id

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedExample:
        """Return a row; documents are numbered from 1."""
        input_ids: list[int] = []
        document_ids: list[int] = []
        for number, window in enumerate(self.rows[index], start=1):
            document = self.documents[window.sequence]
            input_ids += document
            document_ids += [number] * len(document)
        return {"sample_id": self.first_id + index, "input_ids": input_ids, "document_ids": document_ids}

    def row_tokens(self) -> Ints:
        """Return the targets of each row: every token but the first of a document."""
        return np.array([sum(window.length - 1 for window in row) for row in self.rows], dtype=np.int64)
