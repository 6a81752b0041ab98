"""Detection of encoding and delimiter of text files, if they are not given as options."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Container
from contextlib import suppress
from itertools import islice
from pathlib import Path

from malleable.datamodules.files.encoding import CONVERT, WINDOWS, EncodingError
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import cell_text, numbered_lines, open_text, read_lines

log = logging.getLogger(__name__)

DELIMITERS = (",", ";", "\t", "|")
OTHER_SCRIPTS = ("cp1251", "cp1253", "shift_jis", "gb18030", "euc_kr")
"""Encodings of other scripts, whose files can often be decoded as cp1252."""
_PIECE = 1 << 18
_NAMES = {"\t": "tab"}
# Text in Western European languages rarely has so many adjacent characters beyond ASCII.
_RUN = re.compile(r"[^\x00-\x7f]{4,}")
_ACCENTED = re.compile(r'[^\s,;|"]*[^\x00-\x7f][^\s,;|"]*')


def sniff_encoding(path: Path, other: str | None = None) -> str | None:
    """Detect the encoding of a text file.

    A file with a byte-order mark has the encoding of the mark. Another file is UTF-8 if it can be decoded as UTF-8, and otherwise has the encoding
    ``other``. If ``other`` is not given, the encoding is cp1252, which programs on Western European Windows use, and a warning is logged. If the text
    may as well be in another script, or if some lines are UTF-8, the encoding is ambiguous, which is an error.

    Args:
        path: The file.
        other: Encoding of files that are not UTF-8, for example the option ``encoding`` of the source.

    Returns:
        Argument ``encoding`` of :func:`~malleable.datamodules.files.text_files.open_text`: ``None`` for UTF-8 and for files with a byte-order mark.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a regular file, has none of these encodings, or may have several of them. The message contains the line.
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
        _refuse_damaged(path, _place(error, path))
        _refuse_other_script(path)
        example = brief_repr(next(match[0] for _, line in numbered_lines(path, WINDOWS) if (match := _ACCENTED.search(line))))
        log.warning(
            "%s: read as %s, because it is not UTF-8 (%s); check the accents (e.g. %s), or save it as UTF-8",
            path, WINDOWS, _place(error, path), example,
        )  # fmt: skip
        return WINDOWS


def _refuse_damaged(path: Path, place: str) -> None:
    """Raise an error for a file that is not UTF-8, but has lines with other characters than ASCII in UTF-8."""
    for number, line in numbered_lines(path, "latin-1"):
        if line.isascii():
            continue
        with suppress(UnicodeDecodeError):
            match = _ACCENTED.search(line.encode("latin-1").decode())
            example = brief_repr(match[0]) if match else ""
            raise EncodingError(
                f"{path}: its encoding is ambiguous: line {number} is text in UTF-8 ({example}), but {place} is not; save the whole file as UTF-8, "
                f"or set the option `encoding` of the source, e.g. `encoding: {WINDOWS}`"
            )


def _refuse_other_script(path: Path) -> None:
    """Raise an error for a file that can be decoded as cp1252, but whose text may be in another script."""
    candidates = [name for name in OTHER_SCRIPTS if _is_text(path, name)]
    for number, line in numbered_lines(path, WINDOWS) if candidates else ():
        for match in _RUN.finditer(line):
            content = match[0].encode(WINDOWS)
            # An incomplete character at the end is omitted, because its second byte may be in ASCII.
            readings = {name: codecs.getincrementaldecoder(name)().decode(content) for name in candidates}
            if found := {name: text for name, text in readings.items() if _is_word(text)}:
                listed = " or ".join(f"{name} ({brief_repr(text)})" for name, text in ({WINDOWS: match[0]} | found).items())
                raise EncodingError(f"{path}, line {number}: not text in UTF-8, and its encoding is ambiguous: {listed}; {CONVERT}")


def _is_word(text: str) -> bool:
    letters = sum(map(str.isalpha, text))
    return 2 * letters > len(text) > 1


def encoding_name(path: Path, encoding: str | None = None) -> str:
    """Return the name, in upper case, of the encoding that a text file is read in.

    Args:
        path: The file.
        encoding: Encoding of a file without a byte-order mark; default: UTF-8.
    """
    with open_text(path, encoding) as file:
        return codecs.lookup(file.encoding).name.upper().removesuffix("-SIG")


def find_mojibake(path: Path, encoding: str) -> str:
    """Return a message if a file is text in UTF-8, but the user has given another encoding that can also decode it; otherwise an empty string.

    Args:
        path: The file.
        encoding: The given encoding.
    """
    if codecs.lookup(encoding).name.startswith("utf") or "a,\n".encode(encoding) != b"a,\n":
        return ""
    example = None
    try:
        with open_text(path) as file:
            if file.encoding != "utf-8":
                return ""  # a byte-order mark overrides the option
            for number, line in enumerate(file, start=1):
                if example is None and not line.isascii() and (match := _ACCENTED.search(line)):
                    example = number, match[0]
    except EncodingError:
        return ""
    if example is None:
        return ""
    number, text = example
    wrong = text.encode().decode(encoding, errors="replace")
    return (
        f"{path}: the file is text in UTF-8, but is read in the given encoding {encoding}: {brief_repr(text, 40)} in line {number} is read as "
        f"{brief_repr(wrong, 40)}; omit the option `encoding`"
    )


def sniff_delimiter(
    path: Path,
    names: Container[str],
    preferred: str | None = None,
    encoding: str | None = None,
    *,
    default: str = ",",
    has_header: bool = False,
) -> str:
    """Detect the delimiter of a table from its header.

    The candidates are ``preferred``, ``default``, comma, semicolon, tab and vertical bar. The delimiter is the candidate that splits the header into
    cells with the largest number of known names. If the whole header is one known name, and the second line does not contain the default, a semicolon
    or tab in the second line is returned.

    Args:
        path: The file.
        names: Known names of columns, in lower case.
        preferred: Delimiter that is chosen among several candidates with equally many known names.
        encoding: Encoding of a file without a byte-order mark; default: UTF-8.
        default: Delimiter if there is no known name and no preferred delimiter.
        has_header: Whether the first line always contains names of columns. If they are unknown, and it has another candidate instead of the default,
            this candidate is returned.

    Raises:
        ValueError: If there are several candidates, and none of them is preferred.
    """
    default = preferred or default
    lines = [line for _, line in islice(read_lines(path, encoding), 2)]
    header = lines[0] if lines else ""
    counts = {mark: sum(_name(cell) in names for cell in header.split(mark)) for mark in dict.fromkeys((default, *DELIMITERS)) if mark in header}
    if any(counts.values()):
        found = [mark for mark, count in counts.items() if count == max(counts.values())]
        return preferred if preferred in found else _only(found, path, header)
    if len(lines) == 2 and _name(header) in names and default != "\t" and default not in lines[1]:
        found = [mark for mark in (";", "\t") if mark in lines[1]]
        return _only(found, path, lines[1]) if found else default
    return default if default in counts or not counts or not has_header else _only(list(counts), path, header)


def describe_delimiter(delimiter: str) -> str:
    """Return a delimiter in quotes, or the name of an invisible one."""
    return _NAMES.get(delimiter, repr(delimiter))


def _only(found: list[str], path: Path, line: str) -> str:
    if len(found) > 1:
        listed = " or ".join(map(describe_delimiter, found))
        raise ValueError(f"{path}: the delimiter of {brief_repr(line)} is ambiguous: {listed}; set the option `delimiter` of the source")
    return found[0]


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
