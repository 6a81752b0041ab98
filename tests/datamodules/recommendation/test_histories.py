import json
import logging
from pathlib import Path

import pytest

from malleable.datamodules.recommendation.histories import ItemLookup, TextFormat, read_histories, read_users
from malleable.datamodules.sources.recommendation.tables import Tables

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


@pytest.mark.parametrize(("name", "kind", "item"), [("12", "id", 2), ("12", "title", None), ("Heat", "id", None), ("Heat", "title", 1)])
def test_lookup_of_one_kind(name, kind, item):
    assert LOOKUP.find(name, kind=kind) == LOOKUP.find({kind: name}) == item


def test_titles_that_differ_in_case_only():
    lookup = ItemLookup(["Heat", "HEAT", "Up"], [["a"], ["b"], ["c"]])
    assert [lookup.find(name) for name in ("Heat", "HEAT", "heat", "UP")] == [0, 1, None, 2]


@pytest.mark.parametrize("name", [True, 1.5, None, [], {"title": 7}, {"id": 7, "title": "7"}, {"name": "Heat"}, {}])
def test_names_of_other_types_are_an_error(name):
    with pytest.raises(ValueError, match=r"^h.jsonl, line 3: "):
        LOOKUP.find(name, "h.jsonl, line 3")


def read(path, lookup=LOOKUP):
    return [(history.user_id, history.items) for history in read_histories(path, lookup)]


def test_csv_without_a_header_has_titles(tmp_path):
    assert read(write(tmp_path, "h.csv", '"Lion King, The (1994)",Heat \r\n\n7, 1984\n')) == [(None, [0, 1]), (None, [5, 4])]


@pytest.mark.parametrize(
    ("header", "lines", "expected"),
    [
        ("item_id", "12, 13\n10\n", [(None, [2, 3]), (None, [0])]),
        ("title", "Heat,7\n", [(None, [1, 5])]),
        ("history", "Heat,12\n", [(None, [1, 2])]),
        ("user_id,item_id", "10,12,13\n007,10\n10,11\n", [("10", [2, 3]), ("007", [0]), ("10", [1])]),
        ("User_ID,Title", "Heat,7\n", [("Heat", [5])]),
        ("user,item_id,item_id", "u1,12,13,99\n", [("u1", [2, 3, 1])]),
    ],
)
def test_csv_with_a_header(tmp_path, header, lines, expected):
    assert read(write(tmp_path, "h.csv", f"\ufeff{header}\n{lines}")) == expected


ROWS = [["Heat", 12], {"history": ["Alien (2003)", {"title": "7"}, {"id": "11"}, {"id": 99}], "user_id": 7}, {"history": ["13"], "user": "u\u2028"}]
READ = [(None, [1, 2]), ("7", [3, 5, 1, 1]), ("u\u2028", [3])]


def test_json(tmp_path):
    assert read(write(tmp_path, "h.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))) == READ
    assert read(write(tmp_path, "h.json", json.dumps(ROWS, indent=1))) == READ


AMBIGUOUS = ItemLookup(["Heat (1995)", "300 (2006)", "1408 (2007)", "Alien (1979)"], [["300"], ["7153"], ["1721"], ["1408"]])


def test_numbers_are_ids_even_if_they_equal_a_title(tmp_path):
    assert read(write(tmp_path, "h.jsonl", "[300, 1408]"), AMBIGUOUS) == [(None, [0, 3])]
    assert read(write(tmp_path, "h.csv", "item_id\n300,1408"), AMBIGUOUS) == [(None, [0, 3])]
    assert read(write(tmp_path, "h.csv", "title\n300,1408"), AMBIGUOUS) == [(None, [1, 2])]
    assert read(write(tmp_path, "h.jsonl", '[{"id": "300"}, {"title": "300"}]'), AMBIGUOUS) == [(None, [0, 1])]


@pytest.mark.parametrize(
    ("name", "text", "line"), [("h.jsonl", '\n["Alien", "300"]', 2), ("h.csv", "300,1408", 1), ("h.csv", "user_id,history\n1,300", 2)]
)
def test_a_string_that_is_an_id_and_another_title_is_an_error(tmp_path, name, text, line):
    with pytest.raises(
        ValueError,
        match=rf"{name}, line {line}: '300' is the id of 'Heat \(1995\)' and the title of '300 \(2006\)' \(id '7153'\); "
        r'state the kind: \{"id": "300"\} or \{"title": "300"\} in JSON, a column item_id or title in CSV',
    ):
        read(write(tmp_path, name, text), AMBIGUOUS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12,Heat\n", r"line 1: '12' is not a title, but the id of an item. Without a header, all cells are titles; .*user_id,item_id"),
        ("Heat\n1,12,13\n", r"line 2: '12' is not a title, but the id"),
        ("u1,Heat,7\nu2,Alien (1979)\n", r"line 1: no line starts with a title; if the first cells are users, add the first line user_id,title"),
        (
            "user_id,item_id,timestamp\n1,12,3\n",
            r"line 1: the header is 'user_id,item_id,timestamp'; expected user_id \(optional\), then one of",
        ),
        ("item_id,user_id\n12,1\n", r"line 1: the header is 'item_id,user_id'"),
        ("user_id\n1\n", r"line 1: the header is 'user_id'"),
        ("user_id,item_id\n1,12\n1,13\n2,12\n", r"every line has one item, and user '1' has 2 lines. Each line is one history"),
        ("user_id,item_id\n1,12,13\n,12\n", r"line 3, field user_id: the id is empty"),
    ],
)
def test_a_user_is_never_read_as_an_item(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"h.csv.*{message}"):
        read(write(tmp_path, "h.csv", text))


def test_unknown_items_are_omitted_and_logged(tmp_path, caplog):
    rows = [["Heat", "The Lion Kng", 12], {"history": [4711], "user_id": 1}, [4711, "7"]]
    path = write(tmp_path, "h.jsonl", "\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        histories = read_histories(path, LOOKUP)
    assert [(history.number, history.items) for history in histories] == [(0, [1, 2]), (2, [5])]
    left_out, empty = caplog.messages
    assert "h.jsonl: omitted 3 items (2 distinct) that are not in the catalogue: line 1: 'The Lion Kng' is neither a title nor an item id" in left_out
    assert "(nearest titles: 'The Lion King (1994)')" in left_out
    assert "line 2: '4711'" in left_out
    assert "h.jsonl: 1 of 3 histories have no known item and get no prediction (first:" in empty


def test_a_file_without_known_items_is_an_error(tmp_path):
    path = write(tmp_path, "h.csv", "The Lion Kng\n")
    with pytest.raises(
        ValueError, match=r"line 1: 'The Lion Kng' is neither .*nearest titles: 'The Lion King \(1994\)'.*No history has a known item"
    ):
        read(path)
    with pytest.raises(ValueError, match=r"line 1: 'Zzzzzzzzzz' is neither a title nor an item id\. No history"):
        read(write(tmp_path, "h.csv", "Zzzzzzzzzz\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.txt", "Heat", "is not a file of histories: give .csv"),
        ("h.csv", "\n", "contains no history"),
        ("h.csv", "item_id\n", "contains no history"),
        ("h.json", "[]", "contains no history"),
        ("h.jsonl", "[]\n", "line 1: this history and all others are empty"),
        ("h.jsonl", "{\n", "line 1: not JSON"),
        ("h.jsonl", '["Heat"]\n{"items": []}\n', "line 2: expected a list of ids or titles, or an object with the list 'history'"),
        ("h.jsonl", '{"history": ["Heat"], "user_id": [1]}', r"line 1, field user_id: an id must be a string or an integer"),
    ],
)
def test_invalid_files_of_histories(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, text))


def test_empty_histories_are_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "h.jsonl"
    path.write_text('["Heat"]\n[]\n{"user_id": "u", "history": []}\n')
    assert [history.number for history in read_histories(path, ItemLookup(("Heat", "Alien"), [["1"], ["2"]]))] == [0]
    assert f"{path}: 2 of 3 histories are empty and get no prediction (first: {path}, line 2)" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "encoding", "written"),
    [
        ("h.csv", "user_id;item_id\né;12;13\n", "utf-8", {}),
        ("h.csv", "user_id;item_id\r\né;12;13\r\n", "cp1252", {}),
        ("h.csv", '"user_id";"item_id"\né;"12";13\n', "cp1252", {}),
        ("h.csv", "user_id\titem_id\né\t12\t13\n", "utf-16", {}),
        ("h.tsv", "user_id\titem_id\né\t12\t13\n", "utf-8", {}),
        ("h.csv", "user_id;item_id\né;12;13\n", "utf-16-le", {"encoding": "utf-16-le", "delimiter": ";"}),
        ("h.csv", "user_id:item_id\né:12:13\n", "utf-8", {"encoding": "cp1252", "delimiter": ":"}),
        ("h.json", '[{"history": [12, "13"], "user_id": "é"}]', "cp1252", {}),
    ],
)
def test_delimiters_and_encodings_of_spreadsheets(tmp_path, caplog, name, text, encoding, written):
    (tmp_path / name).write_bytes(text.encode(encoding))
    histories = read_histories(tmp_path / name, LOOKUP, TextFormat(**written))
    assert [(history.user_id, history.items) for history in histories] == [("é", [2, 3])]
    assert ("read as cp1252, because it is not UTF-8 (line " in caplog.text) == (encoding == "cp1252")


def test_a_single_column_takes_the_delimiter_of_the_next_line(tmp_path):
    assert read(write(tmp_path, "h.csv", "item_id\n12;13\n10\n")) == [(None, [2, 3]), (None, [0])]
    assert read(write(tmp_path, "h.csv", "title\nHeat,7\n")) == [(None, [1, 5])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id\nHeat\n", "line 2: 'Heat' is a title; rename the column item_id to title"),
        ("title\n12\n", "line 2: '12' is an item id; rename the column title to item_id"),
        (
            "Heat;Alien (1979)\n",
            "line 1: 'Heat;Alien (1979)' contains several items; add a first line with names of columns and ';' between them, e.g. user_id;item_id",
        ),
        ("item_id\n12|13\n", "line 2: '12|13' contains several items; add a first line with names of columns and '|'"),
    ],
)
def test_columns_of_the_wrong_kind(tmp_path, text, message):
    with pytest.raises(ValueError, match="No history has a known item") as raised:
        read(write(tmp_path, "h.csv", text))
    assert message in str(raised.value)


def test_users_in_several_rows_are_reported(tmp_path, caplog):
    path = write(tmp_path, "u.csv", "name;user_id\nx;u1\ny;u2\nz;u1\n")
    assert read_users(path, {"u1", "u2"}) == [(0, "u1"), (1, "u2"), (2, "u1")]
    assert "1 users have several rows (first: 'u1', line 2 and line 4); each row gets a separate prediction" in caplog.text


def test_unknown_and_removed_users_are_reported_separately(tmp_path, caplog):
    path = write(tmp_path, "u.csv", "user_id\nu1\nu2\nw\nx\ny\nz\n")
    assert read_users(path, {"u1"}, filtered={"u1", "u2"}) == [(0, "u1")]
    assert "4 of 6 users are not in the data ('w' in line 4, 'x' in line 5, 'y' in line 6, ...); they get no prediction" in caplog.text
    assert "1 of 6 users were removed by the filters of the split ('u2' in line 3); they get no prediction" in caplog.text


def test_files_of_prediction_have_the_detected_format_of_the_source(tmp_path):
    (tmp_path / "events.csv").write_text("user_id;item_id;timestamp\nu;a;1\n")
    assert TextFormat.of_source(Tables(str(tmp_path / "events.csv"), "items.csv")) == TextFormat(";")
    assert TextFormat.of_source(Tables(str(tmp_path / "events.csv"), "items.csv", delimiter=",")) == TextFormat(",")
    assert TextFormat.of_source(object()) == TextFormat()
