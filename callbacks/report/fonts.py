"""Fonts for labels in all scripts, and replacement of characters that no installed font has."""

from __future__ import annotations

import logging
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
MAX_ESCAPED = 2  # a label with more missing characters is replaced by the id


@cache
def installed_families() -> tuple[str, ...]:
    """Return the installed font families, beginning with the default font of matplotlib."""
    from matplotlib.font_manager import fontManager

    names = {entry.name for entry in fontManager.ttflist}
    return (DEFAULT, *(name for name in FAMILIES if name in names))


def drawable(title: str, key: str = "") -> str:
    r"""Convert a title to a label that can be drawn with the installed fonts.

    One or two missing characters are replaced by escapes such as ``\u65e5``. If more characters are missing, the id of the item replaces the title.

    Args:
        title: The title.
        key: Id of the item; empty if it has none.
    """
    missing = [character for character in title if not _is_drawable(character)]
    if not missing:
        return title
    _log_missing()
    return _escaped(f"id {key}" if len(missing) > MAX_ESCAPED and key else title)


def _escaped(text: str) -> str:
    return "".join(character if _is_drawable(character) else character.encode("unicode_escape").decode() for character in text)


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
        "no installed font has some characters of the titles, so figures show ids or escapes; install fonts such as Noto Sans CJK and Noto Emoji"
    )
