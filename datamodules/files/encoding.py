"""Encodings of text files: names, byte-order marks, and error messages with line and byte."""

from __future__ import annotations

import codecs
import difflib
from encodings.aliases import aliases
from typing import BinaryIO

WINDOWS = "cp1252"
"""Encoding without a byte-order mark that programs on Western European Windows use."""
COMMON = ("utf-8", WINDOWS, "latin-1", "utf-16", "shift_jis", "gb18030", "euc_kr", "cp1250", "cp1251", "iso8859-15", "mac_roman")
"""Frequent encodings of tables, for messages."""
CONVERT = "save it as UTF-8, or set the option `encoding` of the source if it has this option"
"""Remedy for a file in another encoding, for messages."""
# UTF-32 must come first: its byte-order mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PIECE = 1 << 18
_BLANK = "\t\n\r\xa0\xad"


class EncodingError(ValueError):
    """Raised if a file is not text in its encoding."""


def marked_encoding(start: bytes) -> str | None:
    """Return the encoding of the byte-order mark of a file, or ``None``.

    Args:
        start: The first four bytes.
    """
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def check_encoding(encoding: str | None) -> None:
    """Check the option ``encoding`` of a source.

    Raises:
        ValueError: If Python has no text encoding of this name; the message contains similar names.
    """
    try:
        if encoding is None or codecs.lookup(encoding)._is_text_encoding:
            return
    except (LookupError, ValueError):
        pass
    name = str(encoding).lower()
    near = difflib.get_close_matches(name, COMMON, n=3) or difflib.get_close_matches(name, aliases, n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(
        f"encoding: {encoding!r} is unknown{hint}; set the option `encoding` of the source (--data.source.encoding) to a name such as "
        f"{', '.join(COMMON[:5])}, or omit it for UTF-8"
    )


def describe_undecodable(source: BinaryIO, path: str, encoding: str, error: UnicodeError, *, is_marked: bool) -> str:
    """Return an error message with the place and the reason of a decoding error, and a remedy.

    Args:
        source: The file, at its start.
        path: Name of the file.
        encoding: The encoding.
        error: Error of the decoder.
        is_marked: Whether the encoding comes from a byte-order mark.
    """
    start = source.read(_PIECE)
    source.seek(0)
    place, reason = _first_undecodable(source, encoding) or ("", str(error))
    if is_marked:
        advice = "its byte-order mark is of this encoding; save it again as UTF-8"
    elif _is(encoding, "utf-8") and _may_be_windows(start):
        advice = f"save it as UTF-8, or set the option `encoding: {WINDOWS}` of the source if a program on Windows wrote it"
    elif not _is(encoding, "utf-8") and _is_utf8(start):
        advice = "it is text in UTF-8: omit the option `encoding`"
    else:
        advice = CONVERT
    return f"{path}{place}: not text in {codecs.lookup(encoding).name.upper().removesuffix('-SIG')} ({reason}); {advice}"


def _first_undecodable(source: BinaryIO, encoding: str) -> tuple[str, str] | None:
    """Return the place of the first bytes that cannot be decoded, and the reason."""
    one_byte = len("\n\n".encode(encoding)) == len("\n".encode(encoding)) + 1  # if a line feed is one byte, lines can be found in the bytes
    decoder = codecs.getincrementaldecoder(encoding)()
    number, line = 1, b""
    while True:
        before, line = line, source.readline(_PIECE)
        try:
            number += decoder.decode(line, final=not line).count("\n")
        except UnicodeDecodeError as error:
            # The decoder prepends the incomplete character at the end of the previous piece.
            position = error.start - (len(error.object) - len(line)) + (0 if line else len(before))
            byte = f", byte {position + 1}" if one_byte and position >= 0 else ""
            return f", line {number}{byte}", f"{error.reason} 0x{error.object[error.start : error.start + 1].hex()}"
        except UnicodeError as error:  # UTF-16 without a byte-order mark
            return f", line {number}", str(error)
        if not line:
            return None


def _is(encoding: str, name: str) -> bool:
    return codecs.lookup(encoding).name.removesuffix("-sig") == name


def _is_utf8(start: bytes) -> bool:
    """Return whether the first bytes of a file are UTF-8; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def _may_be_windows(start: bytes) -> bool:
    """Return whether bytes may be text in cp1252: all bytes are defined, and there are no control characters."""
    try:
        text = start.decode(WINDOWS)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in _BLANK for character in text)
