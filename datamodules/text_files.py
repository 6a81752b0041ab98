"""Text files: lines and JSON rows with their places, for errors that name file and line; ids as the user writes them."""

from __future__ import annotations

import gzip
import json
import numbers
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

BLANKS = " \t"
"""Characters that do not belong to a cell of a table of text where they stand at its ends."""


class JsonRow(NamedTuple):
    """A row of a file of JSON.

    Attributes:
        number: Line in JSON lines, position in an array; both start at 1.
        place: File and line or entry, for messages.
        value: The parsed row.
    """

    number: int
    place: str
    value: Any


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, compressed by gzip if it ends in ``.gz``. Lines end at line feeds only.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text in UTF-8, or no gzip.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of an existing one")
    packed = path.suffix == ".gz"
    options: Any = {"mode": "rt", "encoding": "utf-8-sig", "newline": "\n"}
    try:
        with gzip.open(path, **options) if packed else path.open(**options) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); fetch it again") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a text file that hold more than white space.

    A line ends at ``\n`` or ``\r\n`` and nowhere else: form feed, U+0085, U+2028 and U+2029 are characters of the text. The line end
    is removed, all else stays.

    Yields:
        Number of the line, from 1, and the line.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix("\n").removesuffix("\r")


def read_json_rows(path: Path) -> Iterator[JsonRow]:
    """Yield the rows of a JSON array, or of JSON lines.

    A file that ends in ``.jsonl`` (or ``.jsonl.gz``) has a JSON value a line, see :func:`read_lines`. Another one is a JSON array if it starts
    with ``[``, and has a JSON value a line otherwise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON; with file and line.
    """
    hint = ""
    if ".jsonl" not in path.suffixes[-2:]:
        hint = "; expected a JSON array, or one JSON value a line"
        with open_text(path) as file:
            start = next((line.lstrip() for line in file if line.strip()), "")
        if start.startswith("["):
            for number, value in enumerate(read_json(path), start=1):
                yield JsonRow(number, f"{path}, entry {number}", value)
            return
    for number, line in read_lines(path):
        place = f"{path}, line {number}"
        yield JsonRow(number, place, _parsed(line, place, hint))


def read_json(path: Path) -> Any:
    """Read a file that is one JSON value.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON.
    """
    with open_text(path) as file:
        return _parsed(file.read(), str(path))


def _parsed(text: str, place: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = "; the name of a file with one JSON value a line ends in .jsonl" if str(error).startswith("Extra data") else hint
        raise ValueError(f"{place}: no JSON ({error}){hint}") from error


def id_text(value: Any, place: str, significand_bits: int = 52) -> str:
    """Return an id as text.

    Text stays as it is, to the character: ``007``, ``pkg-1.0`` and ``pkg-1`` are three ids. Integers are written in decimal.
    A column of integers with a gap is stored as floating-point numbers by some programs: whole ones are written as integers.

    Args:
        value: What the file has.
        place: File, line and field, for messages.
        significand_bits: Of the floating-point format that the file stores: 52 in float64, 23 in float32.

    Raises:
        ValueError: If it is empty, no text and no number, or a number that is not whole or too large to be exact.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{place}: the id is empty; give every row an id")
        return value
    if value is None or value != value:
        raise ValueError(f"{place}: the id is empty; give every row an id")
    if type(value).__name__.startswith("bool") or not issubclass(type(value), numbers.Real):
        raise ValueError(f"{place}: an id is a text or an integer, got {value!r:.80} ({type(value).__name__})")
    # From 2**53 on, several integers share a floating-point number; in float32 from 2**24 on.
    if not issubclass(type(value), numbers.Integral) and (value != value // 1 or abs(value) >= 2 ** (significand_bits + 1)):
        raise ValueError(f"{place}: the number {value} is no exact integer; store ids as integers or as text")
    return str(int(value))


def cell_text(cell: str) -> str:
    """Return a cell of a table of text without the blanks around it: spaces and tabs, and nothing else that Unicode counts as white space.

    So a label may begin or end in a no-break space. All readers of CSV, TSV and lines with tabs use it; JSON and Parquet keep every character.
    """
    return cell.strip(BLANKS)


def ends_in_blank(text: str) -> bool:
    """Return whether a text ends in a space, a tab or a no-break space. Tokenizers join these to the word that follows."""
    return text[-1:] in (*BLANKS, "\u00a0")
