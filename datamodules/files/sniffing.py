"""Detection of encoding and delimiter of text tables, if they are not given as options."""

from __future__ import annotations

import logging
from collections.abc import Container
from itertools import islice
from pathlib import Path

from malleable.datamodules.files.encoding import WINDOWS, EncodingError
from malleable.datamodules.files.text_files import cell_text, open_text, read_lines

log = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
_PIECE = 1 << 18


def sniff_encoding(path: Path, other: str | None = None) -> str | None:
    """Detect the encoding of a text file.

    A file with a byte-order mark has the encoding of the mark. Another file is UTF-8 if it can be decoded as UTF-8, and otherwise has the encoding
    ``other``. If ``other`` is not given, the encoding is cp1252, which programs on Western European Windows use, and a warning is logged.

    Args:
        path: The file.
        other: Encoding of files that are not UTF-8, for example the option ``encoding`` of the source.

    Returns:
        Argument ``encoding`` of :func:`~malleable.datamodules.files.text_files.open_text`: ``None`` for UTF-8 and for files with a byte-order mark.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a regular file, or has none of these encodings. The message contains line and byte.
    """
    marked = False
    try:
        with open_text(path) as file:
            marked = file.encoding != "utf-8"
            # English text in UTF-16 without a byte-order mark is valid UTF-8, with a NUL next to each letter.
            has_nul = any("\0" in part for part in iter(lambda: file.read(_PIECE), ""))
        return other if has_nul and not marked else None
    except EncodingError as error:
        if marked:
            raise
        if other is not None:
            return other
        if not _is_text(path, WINDOWS):
            raise
        log.warning("%s: read as %s, because it is not UTF-8 (%s); check the accents, or save it as UTF-8", path, WINDOWS, _place(error, path))
        return WINDOWS


def sniff_delimiter(path: Path, names: Container[str], default: str = ",", encoding: str | None = None) -> str:
    """Detect the delimiter of a table with a header.

    The candidates are ``default``, comma, semicolon, tab and vertical bar, in this order. The first candidate is returned that splits the header into
    cells with at least one known name. If the whole header is one known name, and the second line does not contain ``default``, a semicolon or tab in
    the second line is returned. Otherwise, ``default`` is returned.

    Args:
        path: The file.
        names: Known names of columns, in lower case.
        default: Delimiter if none is detected.
        encoding: Encoding of a file without a byte-order mark; default: UTF-8.
    """
    lines = [line for _, line in islice(read_lines(path, encoding), 2)]
    for delimiter in dict.fromkeys((default, *DELIMITERS)):
        if lines and delimiter in lines[0] and any(_name(cell) in names for cell in lines[0].split(delimiter)):
            return delimiter
    if len(lines) == 2 and _name(lines[0]) in names and default not in lines[1]:
        return next((delimiter for delimiter in (";", "\t") if delimiter in lines[1]), default)
    return default


def _name(cell: str) -> str:
    return cell_text(cell).strip('"').casefold()


def _is_text(path: Path, encoding: str) -> bool:
    try:
        with open_text(path, encoding) as file:
            return all("\0" not in part for part in iter(lambda: file.read(_PIECE), ""))
    except EncodingError:
        return False


def _place(error: EncodingError, path: Path) -> str:
    return str(error).removeprefix(f"{path}, ").partition(":")[0]
