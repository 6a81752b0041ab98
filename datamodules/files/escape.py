"""Escaping of labels from data in terminals, Markdown and CSV, so that they are not interpreted as commands or markup, and short forms of values."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from typing import Any

_MARKDOWN = re.compile(r"[\\`*\[\]<>&|]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|(?<=\w):(?=//)|(?<=www)\.", re.IGNORECASE)
_FORMULA = "=+-@\t\r"
# Characters that change the direction of text.
_DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def for_terminal(text: str, keep: str = "") -> str:
    r"""Replace control characters, such as cursor movements and changes of the text direction, by escapes such as ``\u001b``.

    Args:
        text: The text.
        keep: Control characters that are not replaced, such as line feeds.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) if _controls(character) and character not in keep else character for character in text)


def for_markdown(text: str) -> str:
    """Escape a text so that Markdown and HTML show its characters, without tags, links, images, table columns or emphasis."""
    return _MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", for_terminal(text.replace("\r\n", " ").replace("\n", " ")))


def for_csv(cell: Any) -> Any:
    """Prefix a text that spreadsheets would interpret as a formula with an apostrophe; numbers, also as text, are not changed."""
    if not isinstance(cell, str) or cell[:1] not in _FORMULA or not cell:
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def brief_repr(value: Any, length: int = 80) -> str:
    """Return the ``repr`` of a value for a message. Long values are shortened in the middle by ``...``, and keep their closing quote or bracket.

    Args:
        value: The value.
        length: Maximum number of characters of a string, a number or another single value. Lists show six elements, dictionaries four.
    """
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = length
    brief.maxlevel = 2
    return brief.repr(value)


def _controls(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in _DIRECTIONS


def _visible(character: str) -> str:
    return f"\\u{ord(character):04x}"
