"""Match of generated texts with answers: words of the first sentence, independent of case and punctuation."""

import pytest

from malleable.lightning_modules.functional.editing.answer_match import contains_answer, first_sentence, normalize_answer


def test_normalisation_removes_case_punctuation_and_articles():
    assert normalize_answer("The  Beatles' “Help!”") == "beatles help"
    assert normalize_answer("ＡＢＣ") == "abc"


@pytest.mark.parametrize(
    ("text", "least", "expected"),
    [
        (" French. She was", 0, "French."),
        ("\nFrench\nEnglish", 0, "French"),
        ("St. Petersburg. It lies", 14, "St. Petersburg."),
        ("3.5 metres", 0, "3.5 metres"),
        ("東京。大阪", 0, "東京。"),
    ],
)
def test_first_sentence(text, least, expected):
    assert first_sentence(text, least) == expected


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" French, and she", "French", True),
        ("the mother tongue is French.", "french", True),
        ("Frenchman", "French", False),
        ("English. French is not", "French", False),
        ("St. Petersburg, Russia", "St. Petersburg", True),
        ("New big York", "New York", False),
        ("the United States of America", "The United States", True),
        ("それは東京です。", "東京", True),
        ("", "French", False),
        ("French", "?!", False),
    ],
)
def test_contains_answer(text, answer, right):
    assert contains_answer(text, answer) is right
