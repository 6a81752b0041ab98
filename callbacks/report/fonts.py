"""Labels of figures in every script: families that are installed, and substitutes for characters that none of them has."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger(__name__)

DEFAULT = "DejaVu Sans"
# What systems install for scripts and symbols that matplotlib's own font lacks; fonts of coloured bitmaps cannot be drawn.
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
MAX_ESCAPED = 2  # characters of a label that are written as numbers before the label becomes an id


@cache
def installed_families() -> tuple[str, ...]:
    """Return the families to look for characters in, matplotlib's own font first."""
    from matplotlib.font_manager import fontManager

    names = {entry.name for entry in fontManager.ttflist}
    return (DEFAULT, *(name for name in FAMILIES if name in names))


def drawable(title: str, key: str = "") -> str:
    r"""Return a label of characters that an installed font has.

    One or two other characters are written as ``\u65e5``. With more of them, the item's id takes the place of the title.

    Args:
        title: The label.
        key: Id of the item; empty where it has none.
    """
    missing = [character for character in title if not _is_drawable(character)]
    if not missing:
        return title
    _report()
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


@cache  # once is enough
def _report() -> None:
    log.info(
        "figures show ids or numbers for characters that no installed font has; install fonts that have them, such as Noto Sans CJK and Noto Emoji"
    )
