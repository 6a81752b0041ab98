"""Encoding and delimiter of tables that come without options, by rules that do not depend on what the cells mean."""

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
    """Return the encoding to read a text file in.

    A byte-order mark decides. Without one, the file is UTF-8 if all of it is; else it is in ``other``, and where that is not given in cp1252, which
    programs on Western European Windows write. The latter is reported.

    Args:
        path: The file.
        other: Encoding of files that are not UTF-8, for example that of the source.

    Returns:
        What :func:`~malleable.datamodules.files.text_files.open_text` takes: ``None`` for UTF-8 or the encoding of the mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of them, or no regular file; with line and byte.
    """
    marked = False
    try:
        with open_text(path) as file:
            marked = file.encoding != "utf-8"
            # UTF-16 without a mark looks like UTF-8 with a NUL beside every letter.
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
    """Return what stands between the cells of a table whose first line names the columns.

    It is the first of ``default``, comma, semicolon, tab and vertical bar that parts the first line into cells of which one is a known name. Where
    the first line is a single known name, it is a semicolon or a tab of the second line, if that does not have the default. Else it is the default.

    Args:
        path: The file.
        names: Names of columns, in small letters.
        default: Delimiter of a file that does not tell.
        encoding: Of a file without a byte-order mark; default: UTF-8.
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
