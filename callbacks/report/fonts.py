"""Fonts for labels in all scripts, and replacement of characters that no installed font has."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache

log = logging.getLogger(__name__)

DEFAULT = "DejaVu Sans"
# Common system fonts for scripts and symbols that the default font of matplotlib lacks. matplotlib cannot draw colour bitmap fonts.
FAMILIES = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "JP", "KR", "TC")),
    *(f"Noto Sans {region}" for region in ("SC", "JP", "KR", "TC")),
    *("Source Han Sans SC", "Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("IPAexGothic", "IPAGothic", "TakaoPGothic", "VL PGothic", "NanumGothic", "UnDotum"),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "MS Gothic", "Malgun Gothic", "Nirmala UI"),
    *("PingFang SC", "Hiragino Sans", "Heiti TC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *(f"Noto Sans {script}" for script in ("Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai", "Georgian", "Armenian", "Symbols")),
    *("Noto Emoji", "Symbola", "Segoe UI Emoji", "Segoe UI Symbol", "FreeSans", "Unifont"),
)
MAX_MISSING = 2  # a label with more missing letters, or a label of more missing symbols only, is replaced by the id
MISSING = "\u25a1"  # white square, which marks a missing letter


@cache
def installed_families() -> tuple[str, ...]:
    """Return the installed font families, beginning with the default font of matplotlib."""
    from matplotlib.font_manager import fontManager

    names = {entry.name for entry in fontManager.ttflist}
    return (DEFAULT, *(name for name in FAMILIES if name in names))


def drawable(title: str, key: str = "") -> str:
    """Convert a title to a label that can be drawn with the installed fonts.

    Characters that no font has are replaced by compatible ones, e.g. full-width letters by plain ones. Otherwise, symbols such as emoji are omitted,
    and one or two letters are replaced by white squares. If more letters are missing, the id of the item replaces the title. A title of symbols only
    is replaced by their Unicode names in brackets.

    Args:
        title: The title.
        key: Id of the item; empty if it has none.
    """
    if all(map(_is_drawable, title)):
        return title
    _log_missing()
    parts = [character if _is_drawable(character) else _replacement(character) for character in title]
    label = " ".join("".join(parts).split())
    if any(character.isalnum() for character in label) and parts.count(MISSING) <= MAX_MISSING:
        return label
    names = [unicodedata.name(character, "").lower() for character in title if _is_symbol(character) and not _is_drawable(character)]
    if MISSING not in parts and len(names := list(filter(None, names))) in range(1, MAX_MISSING + 1):
        return " ".join(f"[{name}]" for name in names)
    if key and key != title:
        return drawable(f"id {key}")
    return label or MISSING


def _replacement(character: str) -> str:
    """Return drawable characters instead of a missing one: compatible characters, nothing for a symbol, or a white square for a letter."""
    compatible = unicodedata.normalize("NFKC", character)
    if compatible != character and all(map(_is_drawable, compatible)):
        return compatible
    return MISSING if unicodedata.category(character)[0] in "LN" else ""


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character)[0] in "SP"


def _is_drawable(character: str) -> bool:
    return ord(character) in _characters() or character.isspace()


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return frozenset().union(*(FT2Font(findfont(FontProperties(family=name))).get_charmap() for name in installed_families()))


@cache  # logs once
def _log_missing() -> None:
    log.info(
        "no installed font has some characters of the titles, so figures omit symbols, and show white squares or ids instead of letters; install "
        "fonts such as Noto Sans CJK and Noto Emoji"
    )
