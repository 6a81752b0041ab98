"""Registry of readers, and whole files in the formats that several of them read."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Reader(NamedTuple):
    """A reader.

    Attributes:
        make: Writes whole files into a folder.
        files: Names of those that are damaged, one at a time.
        read: Reads the folder.
        slow: Factor by which fewer files are damaged.
    """

    make: Callable[[Path], Any]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    slow: int = 1


READERS: dict[str, Reader] = {}


def reader(name: str, *files: str, slow: int = 1) -> Callable[[Any], Any]:
    """Register a class with functions ``make`` and ``read`` of a folder."""

    def register(cls: Any) -> Any:
        READERS[name] = Reader(cls.make, files, cls.read, slow)
        return cls

    return register


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def table(rows: list[dict[str, Any]], delimiter: str) -> str:
    cells = [list(rows[0]), *([("|".join(cell) if isinstance(cell, list) else str(cell)) for cell in row.values()] for row in rows)]
    quote = '"{}"'.format if delimiter == "," else "{}".format
    return "\n".join(delimiter.join(quote(cell) if "," in cell else cell for cell in row) for row in cells) + "\n"


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    text = {"csv": lambda: table(rows, ","), "tsv": lambda: table(rows, "\t"), "jsonl": lambda: lines(rows), "json": lambda: json.dumps(rows)}
    data = text[name.rpartition(".")[2]]().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def copy(source: Path, target: Path) -> None:
    """Copy whole files, of which one is damaged then."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
