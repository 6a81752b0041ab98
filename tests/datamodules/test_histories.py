import json
from pathlib import Path

import pytest

from malleable.datamodules.histories import ItemLookup, read_histories

TITLES = ["The Lion King (1994)", "Heat (1995)", "Alien (1979)", "Alien (2003)", "1984 (1984)", "7"]
LOOKUP = ItemLookup(TITLES, [["10"], ["11", "99"], ["12"], ["13"], ["14"], ["15"]])


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("Heat (1995)", 1),
        ("heat (1995)", 1),
        ("Heat", 1),
        ("Lion King, The (1994)", 0),
        ("Alien", None),
        ("11", 1),
        ("99", 1),
        ("1984", 4),
        ("7", 5),
        ("x", None),
    ],
)
def test_lookup(name, item):
    assert LOOKUP.find(name) == item


def test_csv_has_one_history_a_line(tmp_path):
    path = write(tmp_path, "h.csv", '"Lion King, The (1994)",Heat\n\n12, 13\n')
    assert read_histories(path, LOOKUP) == [[0, 1], [2, 3]]


def test_jsonl_takes_lists_objects_and_ids(tmp_path):
    path = write(tmp_path, "h.jsonl", json.dumps(["Heat", 12]) + "\n\n" + json.dumps({"history": ["Alien (2003)"], "user": "u"}) + "\n")
    assert read_histories(path, LOOKUP) == [[1, 2], [3]]


def test_an_unknown_title_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, "h.csv", "Heat\nThe Lion Kng\n")
    with pytest.raises(
        ValueError, match=r"h.csv, line 2: 'The Lion Kng' is neither a title nor an item id of the catalogue; nearest titles: 'The Lion King"
    ):
        read_histories(path, LOOKUP)


def test_an_unknown_title_far_from_all_has_no_hint(tmp_path):
    with pytest.raises(ValueError, match=r"'Zzzzzzzzzz' is neither a title nor an item id of the catalogue$"):
        read_histories(write(tmp_path, "h.csv", "Zzzzzzzzzz\n"), LOOKUP)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.txt", "Heat", "is no file of histories: give .csv"),
        ("h.csv", "\n", "holds no history"),
        ("h.jsonl", "[]\n", "line 1: the history is empty"),
        ("h.jsonl", "{\n", "line 1: no JSON"),
        ("h.jsonl", '["Heat"]\n{"items": []}\n', "line 2: expected a list of titles or ids, or an object with a list 'history'"),
    ],
)
def test_what_is_no_file_of_histories(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_histories(write(tmp_path, name, text), LOOKUP)
