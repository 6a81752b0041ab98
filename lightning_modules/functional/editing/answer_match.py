"""Whether a freely generated text gives an answer."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")


def normalize_answer(text: str) -> str:
    """Lower-case a text and drop punctuation, English articles and repeated blanks.

    Source:
        Rajpurkar et al. (2016), SQuAD, arXiv:1606.05250, as its authors' evaluation does; on Unicode's compatibility form.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in folded)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def first_sentence(text: str, least: int = 0) -> str:
    """First line of a text up to the end of its first sentence.

    Args:
        text: Leading blanks and line breaks are dropped.
        least: Characters before which a full stop is none of a sentence ("St. Petersburg").
    """
    line = text.strip().split("\n", 1)[0]
    found = _SENTENCE_END.search(line, max(0, least - 1))
    return line if found is None else line[: found.end()]


def gives_answer(text: str, answer: str) -> bool:
    """Whether the first sentence of a text has all words of an answer, in order and without others between them.

    Both are normalised (:func:`normalize_answer`). Scripts without blanks between words are searched for the answer's characters.

    Args:
        text: What a model generated.
        answer: What it should say.
    """
    wanted = normalize_answer(answer)
    if not wanted:
        return False
    before = "" if unicodedata.category(wanted[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(wanted[-1]) == "Lo" else r"(?!\w)"
    return re.search(f"{before}{re.escape(wanted)}{after}", normalize_answer(first_sentence(text, len(answer)))) is not None
