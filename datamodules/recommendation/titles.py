"""Cleaning and merging of titles, which are the texts of items for language models."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = r"The|An?|L[aeo]s?|L'|Une?|El|Il|Gli|Der|Die|Das|Eine?|De[nt]?|Het|Os?|Uma?"
# "Head, The" at the end of a title or of a bracket. "Mystery, Alaska" and "Corrina, Corrina" are not changed.
_TRAILING_ARTICLE = re.compile(rf"(?P<start>^|\()(?P<alias>(?:a\.?k\.?a\.? )?)(?P<head>[^()]*[^()\s,]), (?P<article>{_ARTICLES})(?=\s*(?:$|[()]))")
# Names of HTML tags to remove. Other text in angle brackets is kept, including `<s>` and `<q>`, which occur in sizes and as special tokens.
_TAGS = (
    "a|abbr|b|big|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|font|form|h[1-6]|head|hr|html|i|iframe|img|input|ins|label|li|link|"
    "mark|meta|nobr|ol|option|p|pre|script|section|select|small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|wbr"
)
# An incomplete tag at the end of a text is removed if it has an attribute.
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*|/)?>|<(?:{_TAGS})\s+[\w-]+\s*=[^<>]*$|<!--.*?(?:-->|$)", re.IGNORECASE | re.DOTALL)
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\ufeff]")
_QUOTES = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"') | dict.fromkeys("\u2018\u2019\u201a\u00b4", "'"))


def clean_title(title: str) -> str:
    """Clean a title; the result is empty if no readable text remains.

    HTML entities are decoded. HTML tags, enclosing quotes, invisible characters and repeated spaces are removed. Typographic quotes are replaced by
    plain ones. A trailing article is moved to the front, also inside brackets.

    >>> clean_title("Umbrellas of Cherbourg, The (Parapluies de Cherbourg, Les) (1964)")
    'The Umbrellas of Cherbourg (Les Parapluies de Cherbourg) (1964)'
    """
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(title)))
    text = _INVISIBLE.sub("", _TAG.sub(" ", text)).translate(_QUOTES)
    text = " ".join(text.split())
    if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return _TRAILING_ARTICLE.sub(_article_first, text)


def with_year(title: str, year: str) -> str:
    """Append ``(year)`` to a title that does not end with one.

    >>> with_year("Heat", "1995")
    'Heat (1995)'
    """
    if not re.fullmatch(r"\d{4}", year) or re.search(r"\(\d{4}\)$", title):
        return title
    return f"{title} ({year})"


def merge_titles(titles: Sequence[str]) -> tuple[list[str], list[int]]:
    """Merge equal titles to one item.

    Returns:
        Distinct titles in the order of their first occurrence, and the index of each given title among them, -1 for empty titles.
    """
    index: dict[str, int] = {}
    positions = [index.setdefault(title, len(index)) if title else -1 for title in titles]
    return list(index), positions


def _article_first(match: re.Match[str]) -> str:
    article = match["article"]
    space = "" if article.endswith("'") else " "
    return f"{match['start']}{match['alias']}{article}{space}{match['head']}"
