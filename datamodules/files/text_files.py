"""Readers of text files and JSON with line numbers, and conversion of ids to text.

All readers use :func:`open_text`, so that encodings, limits and errors are the same.
"""

from __future__ import annotations

import gzip
import io
import json
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, TypeVar, cast

from malleable.datamodules.files.encoding import CONVERT, EncodingError, check_encoding, describe_undecodable, marked_encoding
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.user_files import check_file, reading

BLANKS = " \t"
"""Characters that are removed at both ends of cells."""
LINE_LIMIT = 1 << 24
"""Maximum number of bytes of a line."""
JSON_LIMIT = 1 << 31
"""Maximum number of bytes of a file with one JSON value."""
DEPTH_LIMIT = 64
"""Maximum nesting of JSON lists and objects."""
EXPANSION_LIMIT = 100
"""Maximum expansion ratio of compressed files with more than ``_SMALL`` bytes of text; typical tables have a ratio of 10."""
_SMALL = 1 << 25
_CHUNK = 1 << 18
_Kind = TypeVar("_Kind")


class JsonRow(NamedTuple):
    """Row of a JSON file.

    Attributes:
        number: Line number in JSON lines, or position in an array; from 1.
        place: File with line or entry, for messages.
        value: Parsed row.
    """

    number: int
    place: str
    value: Any


class _Limited(io.RawIOBase):
    """Byte stream that raises an error if a line or the whole file is too long."""

    def __init__(self, source: BinaryIO, path: Path, line_limit: int) -> None:
        self.source, self.path, self.line_limit = source, path, line_limit
        size = path.stat().st_size
        self.limit = max(_SMALL, EXPANSION_LIMIT * size) if path.suffix == ".gz" else None
        self.total = self.line = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(min(len(buffer), _CHUNK))
        self.total += len(data)
        end = data.rfind(b"\n")
        self.line = self.line + len(data) if end < 0 else len(data) - end - 1
        if self.limit is not None and self.total > self.limit:
            raise ValueError(f"{self.path} expands to more than {EXPANSION_LIMIT} times its size; decompress it yourself and give the text file")
        if self.line > self.line_limit:
            raise ValueError(f"{self.path} has a line of more than {self.line_limit >> 20} MiB; give a text file with one row on each line")
        buffer[: len(data)] = data
        return len(data)


def file_kind(path: Path) -> str:
    """Return the suffix of a file without ``.gz``: ``.csv`` for ``a.csv`` and for ``a.csv.gz``."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


@contextmanager
def open_text(path: Path, encoding: str | None = None, line_limit: int = LINE_LIMIT) -> Iterator[TextIO]:
    """Open a text file, compressed with gzip if it ends in ``.gz``. Lines end at line feeds only.

    Args:
        path: The file.
        encoding: Encoding of a file without a byte-order mark; default: UTF-8. A byte-order mark (UTF-8, UTF-16, UTF-32) overrides it.
        line_limit: Maximum number of bytes of a line.

    Raises:
        FileNotFoundError: If the file does not exist.
        EncodingError: If it is not text in this encoding; with line and byte.
        ValueError: If it is not a regular file, is not gzip, or exceeds the limits.
    """
    check_file(path)
    check_encoding(encoding)
    try:
        with reading(path, "a gzip file"), open_bytes(path) as source, io.BufferedReader(_Limited(source, path, line_limit), _CHUNK) as limited:
            marked = marked_encoding(limited.peek(4)[:4])
            used = marked or encoding or "utf-8"
            try:
                with io.TextIOWrapper(limited, used, newline="\n") as file:
                    yield file
            except UnicodeError as error:
                raise _Undecodable(error) from error
    except _Undecodable as failed:
        with open_bytes(path) as source:
            message = describe_undecodable(source, str(path), used, failed.error, is_marked=marked is not None)
        raise EncodingError(message) from failed.error


class _Undecodable(Exception):
    """Wrapper of a decoding error, which the context ``reading`` would report as a damaged file."""

    def __init__(self, error: UnicodeError) -> None:
        super().__init__(error)
        self.error = error


def open_bytes(path: Path) -> BinaryIO:
    """Open a file as bytes, compressed with gzip if it ends in ``.gz``."""
    return cast("BinaryIO", gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def numbered_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of a text file, from 1, and the line with its end.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: As in :func:`open_text`, or if the file has NUL characters.
    """
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise ValueError(f"{path}, line {number}: a NUL character; the file is binary, or UTF-16 without a byte-order mark: {CONVERT}")
            yield number, line


def read_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a text file that contain more than white space.

    Only ``\n`` and ``\r\n`` end a line; form feed, U+0085, U+2028 and U+2029 are part of the text. The line end is removed.

    Yields:
        Number of the line, from 1, and the line.
    """
    for number, line in numbered_lines(path, encoding):
        if line.strip():
            yield number, line.removesuffix("\n").removesuffix("\r")


def read_json_rows(path: Path, encoding: str | None = None) -> Iterator[JsonRow]:
    """Yield the rows of a JSON array or of JSON lines.

    A file that ends in ``.jsonl`` (or ``.jsonl.gz``) has one JSON value on each line, see :func:`read_lines`. Another file is a JSON array if it
    starts with ``[``, and otherwise also has one JSON value on each line.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON; with file and line.
    """
    hint = ""
    if ".jsonl" not in path.suffixes[-2:]:
        hint = "; expected a JSON array, or one JSON value on each line"
        with open_text(path, encoding, JSON_LIMIT) as file:
            start = next((part.lstrip() for part in iter(lambda: file.read(4096), "") if part.strip()), "")
        if start.startswith("["):
            for number, value in enumerate(read_json(path, encoding), start=1):
                yield JsonRow(number, f"{path}, entry {number}", value)
            return
    for number, line in read_lines(path, encoding):
        place = f"{path}, line {number}"
        yield JsonRow(number, place, parse_json(line, place, hint))


def read_json(path: Path, encoding: str | None = None) -> Any:
    """Read a file with one JSON value.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON, or exceeds the limits of size and nesting.
    """
    with open_text(path, encoding, JSON_LIMIT) as file:
        parts: list[str] = []
        # Read in parts: Python would allocate memory for the whole limit.
        while part := file.read(_CHUNK):
            parts.append(part)
            if len(parts) * _CHUNK > JSON_LIMIT:
                raise ValueError(f"{path} is larger than {JSON_LIMIT >> 30} GiB; write one JSON value on each line, in a file that ends in .jsonl")
    return parse_json("".join(parts), str(path))


def parse_json(text: str, place: str, hint: str = "") -> Any:
    """Parse JSON.

    Args:
        text: The text.
        place: File and line, for messages.
        hint: Remedy for the message.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or contains an unpaired surrogate.
    """
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEPTH_LIMIT and _is_deep(value):
            raise RecursionError(f"lists and objects are nested more than {DEPTH_LIMIT} deep")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        hint = "; a file with one JSON value on each line must end in .jsonl" if str(error).startswith("Extra data") else hint
        raise ValueError(f"{place}: not JSON ({error}){hint}") from error
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH_LIMIT):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]
    return bool(level)


def id_text(value: Any, place: str, significand_bits: int = 52) -> str:
    """Convert an id to text.

    Strings are not changed: ``007``, ``pkg-1.0`` and ``pkg-1`` are three ids. Integers are written in decimal. Integral floating-point numbers are
    written as integers, because some programs store integer columns with missing values as floating-point numbers.

    Args:
        value: Value in the file.
        place: File, line and field, for messages.
        significand_bits: Number of significand bits of the stored floating-point format: 52 for float64, 23 for float32.

    Raises:
        ValueError: If the id is empty, neither a string nor a number, or a number that is not integral or too large to be exact.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{place}: the id is empty; give every row an id")
        return value
    if value is None or value != value:
        raise ValueError(f"{place}: the id is empty; give every row an id")
    if type(value).__name__.startswith("bool") or not issubclass(type(value), numbers.Real):
        raise ValueError(f"{place}: an id must be a string or an integer, got {brief_repr(value)} ({type(value).__name__})")
    # Integers above 2**53 are not exact in float64, and above 2**24 not in float32.
    if not issubclass(type(value), numbers.Integral) and (value != value // 1 or abs(value) >= 2 ** (significand_bits + 1)):
        raise ValueError(f"{place}: the number {value} is not an exact integer; store ids as integers or strings")
    return str(int(value))


def text_of(fields: Any, name: str) -> str:
    """Return a field of a JSON object that must be a string.

    Raises:
        ValueError: If the field is missing or not a string.
    """
    return _typed(fields, name, str, "a string")


def texts_of(fields: Any, name: str) -> tuple[str, ...]:
    """Return a field of a JSON object that must be a list of strings.

    Raises:
        ValueError: If the field is missing or not a list of strings.
    """
    value = list_of(fields, name)
    if (wrong := next((part for part in value if not isinstance(part, str)), value)) is not value:
        raise ValueError(f"field {name}: expected a list of strings, got the element {brief_repr(wrong)}")
    return tuple(value)


def list_of(fields: Any, name: str) -> list[Any]:
    """Return a field of a JSON object that must be a list.

    Raises:
        ValueError: If the field is missing or not a list.
    """
    return _typed(fields, name, list, "a list")


def object_of(fields: Any, name: str) -> dict[str, Any]:
    """Return a field of a JSON object that must be an object.

    Raises:
        ValueError: If the field is missing or not an object.
    """
    return _typed(fields, name, dict, "an object")


def _typed(fields: Any, name: str, kind: type[_Kind], described: str) -> _Kind:
    value = field_of(fields, name)
    if not isinstance(value, kind):
        raise ValueError(f"field {name}: expected {described}, got {brief_repr(value)}")
    return value


def field_of(fields: Any, name: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        ValueError: If the field is missing.
    """
    if not isinstance(fields, dict) or name not in fields:
        known = f"the fields are {sorted(fields)}" if isinstance(fields, dict) else f"expected a JSON object, got {fields!r}"
        raise ValueError(f"the field {name!r} is missing; {known:.200}")
    return fields[name]


def cell_text(cell: str) -> str:
    """Remove spaces and tabs at both ends of a cell of a text table.

    Other white space of Unicode, such as a no-break space, is part of a label. Values of JSON and Parquet are not changed.
    """
    return cell.strip(BLANKS)


def ends_in_blank(text: str) -> bool:
    """Return whether a text ends in a space, a tab or a no-break space, which tokenizers join to the next word."""
    return text[-1:] in (*BLANKS, "\u00a0")
