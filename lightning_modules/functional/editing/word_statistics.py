"""Statistics of words: entropy of n-grams, and cosine similarity of TF-IDF vectors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

WORD = re.compile(r"\w+|[^\w\s]")
TERM = re.compile(r"\b\w\w+\b")


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks."""
    return WORD.findall(text)


def ngram_entropy(items: Sequence[str], n: int) -> float:
    """Compute the entropy of the n-gram distribution of a sequence, in bits; 0 if it has no n-gram."""
    counts = Counter(zip(*(items[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """Compute the weighted entropy of the bigrams and trigrams of a text, in bits; 0 if it repeats one word.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, code of the authors:
        ``(2/3 H2 + 4/3 H3) / 2``, which they report times 100.
        Differs: words are split by a regular expression instead of NLTK.
    """
    items = words(text)
    return (2 / 3 * ngram_entropy(items, 2) + 4 / 3 * ngram_entropy(items, 3)) / 2


class Tfidf:
    """TF-IDF vectors of texts.

    Args:
        texts: N texts from which the weights of words are computed: ``1 + log((1 + N) / (1 + texts with the word))``. Words that occur in none of
            them are ignored.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        documents = [set(_terms(text)) for text in texts]
        document_frequency = Counter(term for document in documents for term in document)
        self.idf = {term: 1 + math.log((1 + len(documents)) / (1 + count)) for term, count in document_frequency.items()}

    def vector(self, text: str) -> dict[str, float]:
        """Return the weighted word counts of a text, normalised to length 1; empty if no word has a weight."""
        counts = Counter(term for term in _terms(text) if term in self.idf)
        weighted = {term: count * self.idf[term] for term, count in counts.items()}
        length = math.sqrt(sum(value * value for value in weighted.values()))
        return {term: value / length for term, value in weighted.items()}

    def cosine(self, one: str, other: str) -> float:
        """Compute the cosine similarity of two texts, between 0 and 1."""
        return dot(self.vector(one), self.vector(other))


def dot(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Compute the inner product of sparse vectors."""
    return sum(value * other[term] for term, value in one.items() if term in other)


def _terms(text: str) -> list[str]:
    return TERM.findall(text.lower())
