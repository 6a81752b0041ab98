import csv
import io

import pytest
from hostile import HOSTILE

from malleable.datamodules.files.escape import brief_repr, for_csv, for_markdown, for_terminal


def test_markup_and_control_characters_are_escaped():
    text = for_markdown(HOSTILE + "\n# heading")
    assert not set(text) & set("<>[]`*|\x1b\x9b\u202e\n")
    assert "http:" not in text
    assert "www." not in text
    shown = for_terminal(HOSTILE)
    assert r"\u001b[31m \u009b2J \u202e" in shown
    assert shown.startswith("<script>")


@pytest.mark.parametrize("text", ["Heat (1995)", "hr_10", "Misérables, Les", "日本語", "emoji 👩‍👩‍👧", "a: b", "n't", ""])
def test_plain_labels_are_unchanged(text):
    assert for_markdown(text) == for_terminal(text) == for_csv(text) == text


def test_line_feeds_can_be_kept():
    assert for_terminal("a\nb\tc\rd", keep="\n\t") == r"a" + "\nb\tc" + r"\u000dd"


@pytest.mark.parametrize("cell", ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=1"])
def test_formulas_are_escaped_in_csv(cell):
    assert for_csv(cell) == f"'{cell}"
    file = io.StringIO()
    csv.writer(file).writerow([for_csv(cell)])
    assert next(csv.reader([file.getvalue()]))[0].startswith("'")


@pytest.mark.parametrize("cell", ["-5", "+49", "-1.5e3", -1.0, 0, None, "5"])
def test_numbers_are_unchanged_in_csv(cell):
    assert for_csv(cell) == cell


def test_long_values_keep_closing_quotes_and_brackets():
    assert brief_repr("Heat (1995)") == "'Heat (1995)'"
    assert brief_repr("The Return of the King, extended (2003)", 24) == "'The Retur...ded (2003)'"
    assert brief_repr(["a"] * 10) == "['a', 'a', 'a', 'a', 'a', 'a', ...]"
    assert brief_repr({"a": "b" * 20}, 10) == "{'a': 'bb...bbb'}"
    assert len(brief_repr([["a" * 1000] * 1000] * 1000)) < 5000
