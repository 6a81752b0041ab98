"""Entropies and cosine similarities against hand-computed values."""

import math

import pytest

from malleable.lightning_modules.functional.editing.word_statistics import Tfidf, fluency, ngram_entropy, words


def test_words_and_punctuation_are_split():
    assert words("It's a dog, I know.") == ["It", "'", "s", "a", "dog", ",", "I", "know", "."]


def test_ngram_entropy():
    assert ngram_entropy(list("abab"), 2) == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert ngram_entropy(list("abab"), 3) == pytest.approx(1)
    assert ngram_entropy(["a"], 2) == 0


def test_fluency():
    assert fluency("dog dog dog dog") == 0
    pairs = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency("a b a b") == pytest.approx((2 / 3 * pairs + 4 / 3 * 1) / 2)


def test_rare_words_have_greater_weights():
    tfidf = Tfidf(["the dog", "the cat", "the house"])
    assert tfidf.idf["the"] == pytest.approx(1)
    assert tfidf.idf["dog"] == pytest.approx(1 + math.log(4 / 2))
    assert tfidf.cosine("the dog", "The Dog the DOG") == pytest.approx(1)
    expected = 1 / (1 + tfidf.idf["dog"] ** 2)
    assert tfidf.cosine("the dog", "the cat") == pytest.approx(expected)
    assert tfidf.cosine("unknown words", "the dog") == 0
