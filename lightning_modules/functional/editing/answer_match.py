"""Match of a generated text with an expected answer."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")


def normalize_answer(text: str) -> str:
    """Lower-case a text, and remove punctuation, English articles and repeated spaces.

    Source:
        Rajpurkar et al. (2016), SQuAD, arXiv:1606.05250, evaluation script of the authors.
        Differs: the text is first converted to Unicode's compatibility form (NFKC).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in folded)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def first_sentence(text: str, least: int = 0) -> str:
    """Return the first line of a text up to the end of its first sentence.

    Args:
        text: A text; leading spaces and line breaks are removed.
        least: Number of characters before which a full stop does not end the sentence ("St. Petersburg").
    """
    line = text.strip().split("\n", 1)[0]
    found = _SENTENCE_END.search(line, max(0, least - 1))
    return line if found is None else line[: found.end()]


def contains_answer(text: str, answer: str) -> bool:
    """Return whether the first sentence of a text contains the words of an answer, consecutively and in order.

    Both are normalised with :func:`normalize_answer`. In scripts without spaces between words, the characters of the answer are searched.

    Args:
        text: Generated text.
        answer: Expected answer.
    """
    expected = normalize_answer(answer)
    if not expected:
        return False
    before = "" if unicodedata.category(expected[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(expected[-1]) == "Lo" else r"(?!\w)"
    return re.search(f"{before}{re.escape(expected)}{after}", normalize_answer(first_sentence(text, len(answer)))) is not None
