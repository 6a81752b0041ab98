"""Reading of texts from files."""

from __future__ import annotations

from pathlib import Path

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.table_files import column_names, column_values, read_parquet
from malleable.datamodules.files.text_files import file_kind, read_json_rows, read_lines
from malleable.datamodules.files.user_files import check_file

KINDS = (".txt", ".json", ".jsonl", ".parquet")
FIELDS = ("text", "Text", "content")


def read_texts(path: Path) -> list[str]:
    """Read texts without changing them; texts of white space only are left out.

    Args:
        path: A text file with one text on each line (see :func:`~malleable.datamodules.files.text_files.read_lines`); a JSON array or JSON lines of
            strings or of objects with the field ``text``; or a Parquet file with the column ``text``. The name may also be ``Text`` or
            ``content``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a row is not a text, or if the file contains no texts.
    """
    check_file(path, f"give a file of texts that ends in {', '.join(KINDS)}")
    if path.suffix == ".parquet":
        texts = _of_parquet(path)
    elif file_kind(path) in (".json", ".jsonl"):
        texts = _of_json(path)
    else:
        texts = [line for _, line in read_lines(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} contains no texts; give a file with at least one text")
    return texts


def _of_json(path: Path) -> list[str]:
    texts = []
    for _, place, entry in read_json_rows(path):
        found = entry if isinstance(entry, str) else next((entry[name] for name in FIELDS if isinstance(entry, dict) and name in entry), None)
        if not isinstance(found, str):
            raise ValueError(f"{place}: expected a string or an object with one of {', '.join(FIELDS)}, got {brief_repr(entry)}")
        texts.append(found)
    return texts


def _of_parquet(path: Path) -> list[str]:
    names = column_names(path)
    name = next((name for name in FIELDS if name in names), None)
    if name is None:
        raise ValueError(f"{path} has no column {' or '.join(FIELDS)}; it has {', '.join(names)}; rename the column of the texts")
    texts = [text for text in column_values(read_parquet(path, [name])[name], f"{path}, column {name}") if text is not None]
    if (wrong := next((text for text in texts if not isinstance(text, str)), None)) is not None:
        raise ValueError(f"{path}, column {name}: expected strings, got {brief_repr(wrong)}")
    return texts
