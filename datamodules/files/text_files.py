"""Text files: lines and JSON rows with their places, for errors that name file and line; ids as the user writes them.

All readers of text go through :func:`open_text`, so that encodings, limits and errors are the same for all of them.
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
from malleable.datamodules.files.user_files import check_file, reading

BLANKS = " \t"
"""Characters that do not belong to a cell of a table of text where they stand at its ends."""
LINE_LIMIT = 1 << 24
"""Bytes of a line, at most."""
JSON_LIMIT = 1 << 31
"""Bytes of a file that is one JSON value, at most."""
DEPTH_LIMIT = 64
"""Lists and objects of JSON within each other, at most."""
EXPANSION_LIMIT = 100
"""Bytes of text that a byte of a compressed file of more than ``_SMALL`` bytes of text may stand for; tables of text compress to a tenth."""
_SMALL = 1 << 25
_CHUNK = 1 << 18
_Kind = TypeVar("_Kind")


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


class _Limited(io.RawIOBase):
    """Bytes of a file, refused where a line or the whole is too long."""

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
            raise ValueError(f"{self.path} expands to more than {EXPANSION_LIMIT} times its size: a decompression bomb? Unpack it and give the text")
        if self.line > self.line_limit:
            raise ValueError(f"{self.path} has a line of more than {self.line_limit >> 20} MiB; is it a text file, one row a line?")
        buffer[: len(data)] = data
        return len(data)


def file_kind(path: Path) -> str:
    """Return the ending that says of which kind a file is: ``.csv`` of ``a.csv`` and of ``a.csv.gz``."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


@contextmanager
def open_text(path: Path, encoding: str | None = None, line_limit: int = LINE_LIMIT) -> Iterator[TextIO]:
    """Open a text file, compressed by gzip if it ends in ``.gz``. Lines end at line feeds only.

    The encoding is UTF-8, or that of the byte-order mark (UTF-8, UTF-16, UTF-32) with which the file begins.

    Args:
        path: The file.
        encoding: Of a file without a byte-order mark; default: UTF-8.
        line_limit: Bytes of a line, at most.

    Raises:
        FileNotFoundError: If there is no such file.
        EncodingError: If it is not text in that encoding; with line and byte.
        ValueError: If it is no regular file, or no gzip, or larger than the limits.
    """
    check_file(path)
    check_encoding(encoding)
    try:
        with reading(path, "gzip file"), open_bytes(path) as source, io.BufferedReader(_Limited(source, path, line_limit), _CHUNK) as limited:
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
    """Carries an error out of the contexts that would take it for a damaged file."""

    def __init__(self, error: UnicodeError) -> None:
        super().__init__(error)
        self.error = error


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, compressed by gzip if it ends in ``.gz``."""
    return cast("BinaryIO", gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def numbered_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of a text file, from 1, and the line with its end.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`open_text`, or if it has NUL characters.
    """
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise ValueError(f"{path}, line {number}: a NUL character; the file is not text, or text in UTF-16 without a mark: {CONVERT}")
            yield number, line


def read_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a text file that hold more than white space.

    A line ends at ``\n`` or ``\r\n`` and nowhere else: form feed, U+0085, U+2028 and U+2029 are characters of the text. The line end
    is removed, all else stays.

    Yields:
        Number of the line, from 1, and the line.
    """
    for number, line in numbered_lines(path, encoding):
        if line.strip():
            yield number, line.removesuffix("\n").removesuffix("\r")


def read_json_rows(path: Path, encoding: str | None = None) -> Iterator[JsonRow]:
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
    """Read a file that is one JSON value.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, or larger or nested more deeply than the limits.
    """
    with open_text(path, encoding, JSON_LIMIT) as file:
        parts: list[str] = []
        # Asked for all at once, Python takes memory for the limit.
        while part := file.read(_CHUNK):
            parts.append(part)
            if len(parts) * _CHUNK > JSON_LIMIT:
                raise ValueError(f"{path} is larger than {JSON_LIMIT >> 30} GiB; write one JSON value a line, in a file that ends in .jsonl")
    return parse_json("".join(parts), str(path))


def parse_json(text: str, place: str, hint: str = "") -> Any:
    """Parse JSON.

    Args:
        text: The text.
        place: Where it stands, for messages.
        hint: What to do, for the message.

    Raises:
        ValueError: If it is no JSON, nested too deeply, or has half of a surrogate pair, which no text in Unicode has.
    """
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEPTH_LIMIT and _is_deep(value):
            raise RecursionError(f"lists and objects are nested more than {DEPTH_LIMIT} deep")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        hint = "; the name of a file with one JSON value a line ends in .jsonl" if str(error).startswith("Extra data") else hint
        raise ValueError(f"{place}: no JSON ({error}){hint}") from error
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH_LIMIT):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]
    return bool(level)


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


def text_of(fields: Any, name: str) -> str:
    """Return a field of an object of JSON that must be a text.

    Raises:
        ValueError: If there is no such field, or it is no text.
    """
    return _typed(fields, name, str, "a text")


def texts_of(fields: Any, name: str) -> tuple[str, ...]:
    """Return a field of an object of JSON that must be a list of texts.

    Raises:
        ValueError: If there is no such field, or it is no list of texts.
    """
    value = list_of(fields, name)
    if (wrong := next((part for part in value if not isinstance(part, str)), value)) is not value:
        raise ValueError(f"field {name}: expected a list of texts, got {wrong!r:.80} in it")
    return tuple(value)


def list_of(fields: Any, name: str) -> list[Any]:
    """Return a field of an object of JSON that must be a list.

    Raises:
        ValueError: If there is no such field, or it is no list.
    """
    return _typed(fields, name, list, "a list")


def object_of(fields: Any, name: str) -> dict[str, Any]:
    """Return a field of an object of JSON that must be an object.

    Raises:
        ValueError: If there is no such field, or it is no object.
    """
    return _typed(fields, name, dict, "an object")


def _typed(fields: Any, name: str, kind: type[_Kind], described: str) -> _Kind:
    value = field_of(fields, name)
    if not isinstance(value, kind):
        raise ValueError(f"field {name}: expected {described}, got {value!r:.80}")
    return value


def field_of(fields: Any, name: str) -> Any:
    """Return a field of an object of JSON.

    Raises:
        ValueError: If there is no such field.
    """
    if not isinstance(fields, dict) or name not in fields:
        known = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"no field {name!r}; it has {known!s:.200}")
    return fields[name]


def cell_text(cell: str) -> str:
    """Return a cell of a table of text without the blanks around it: spaces and tabs, and nothing else that Unicode counts as white space.

    So a label may begin or end in a no-break space. All readers of CSV, TSV and lines with tabs use it; JSON and Parquet keep every character.
    """
    return cell.strip(BLANKS)


def ends_in_blank(text: str) -> bool:
    """Return whether a text ends in a space, a tab or a no-break space. Tokenizers join these to the word that follows."""
    return text[-1:] in (*BLANKS, "\u00a0")
