import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from small_tables import EVENTS_HEAD, events_csv, items_csv

from malleable.datamodules.sources.recommendation.tables import Tables

EVENTS = [("u1", "007", 10.0, 4.0), ("u2", "NA", 20.0, 5.0)]
ITEMS = [("007", "Heat", ("Crime", "Drama")), ("NA", "None", ())]


def write(folder: Path, kind: str) -> tuple[str, str]:
    events = pd.DataFrame(EVENTS, columns=["user_id", "item_id", "timestamp", "rating"])
    items = pd.DataFrame({"item_id": [i for i, _, _ in ITEMS], "title": [t for _, t, _ in ITEMS], "genres": [list(g) for _, _, g in ITEMS]})
    joined = items.assign(genres=["Crime | Drama", ""])
    paths = str(folder / f"events.{kind}"), str(folder / f"items.{kind}")
    for table, flat, path in ((events, events, paths[0]), (items, joined, paths[1])):
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "jsonl":
            table.to_json(path, orient="records", lines=True)
        else:
            flat.to_csv(path, index=False, sep="\t" if "tsv" in kind else ",")
    return paths


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_every_kind_of_file_gives_the_same_tables(tmp_path, kind):
    source = Tables(*write(tmp_path, kind))
    tables = source.load()
    assert [tuple(row) for row in tables.interactions.itertuples(index=False)] == EVENTS
    assert [tuple(row) for row in tables.items.itertuples(index=False)] == ITEMS
    assert len(source.files()) == 2


def test_compressed_json_lines(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.jsonl.gz"
    with gzip.open(source.interactions, "wt") as file:
        file.write(json.dumps({"user_id": 1, "item_id": "a", "timestamp": 3}) + "\n")
    assert source.load().interactions.to_dict("list") == {"user_id": ["1"], "item_id": ["a"], "timestamp": [3.0]}


def test_columns_of_other_names(tmp_path):
    source = events_csv(tmp_path, "uid,movie,when,extra\nu,a,1,x\n", interaction_columns={"user_id": "uid", "item_id": "movie", "timestamp": "when"})
    assert source.load().interactions.to_dict("list") == {"user_id": ["u"], "item_id": ["a"], "timestamp": [1.0]}
    assert source.settings()["interactions"] == {"user_id": "uid", "item_id": "movie", "timestamp": "when"}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("1700000000", 1_700_000_000), ("1.5", 1.5), ("1970-01-02", 86_400), ("1970-01-01T01:00:00", 3600), ("1970-01-01T01:00:00+01:00", 0)],
)
def test_times(tmp_path, written, seconds):
    assert events_csv(tmp_path, f"user_id,item_id,timestamp\nu,a,{written}\n").load().interactions["timestamp"].tolist() == [seconds]


def test_times_of_a_parquet_column(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.parquet"
    times = pd.to_datetime(["1970-01-02", "1970-01-01"], utc=True)
    pd.DataFrame({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": times}).to_parquet(source.interactions)
    assert source.load().interactions["timestamp"].tolist() == [86_400.0, 0.0]


def test_integer_ids_with_missing_values_stay_integers(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.parquet"
    pd.DataFrame({"user_id": [1.0, 2.0], "item_id": ["a", "b"], "timestamp": [1, 2]}).to_parquet(source.interactions)
    assert source.load().interactions["user_id"].tolist() == ["1", "2"]


IDS = ["7", "07", "007", "7.0", "pkg-1", "pkg-1.0", "1e3", "NA", "null", "nan", "Heat", "\u0661", "a\u2028b", "-0", "18446744073709551617", "TRUE"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_string_ids_are_not_changed(tmp_path, kind):
    events = pd.DataFrame({"user_id": IDS, "item_id": IDS[::-1], "timestamp": 1})
    items = pd.DataFrame({"item_id": IDS, "title": [f"Title {number}" for number in range(len(IDS))]})
    for name, table in (("events", events), ("items", items)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "jsonl":
            table.to_json(path, orient="records", lines=True, force_ascii=False)
        else:
            table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    tables = Tables(str(tmp_path / f"events.{kind}"), str(tmp_path / f"items.{kind}")).load()
    assert tables.interactions["user_id"].tolist() == IDS
    assert tables.interactions["item_id"].tolist() == IDS[::-1]
    assert tables.items["item_id"].tolist() == IDS


def test_blanks_around_a_cell_of_csv_are_removed(tmp_path):
    source = events_csv(tmp_path, "user_id,item_id,timestamp\n u 1,  a ,1\n")
    assert source.load().interactions[["user_id", "item_id"]].values.tolist() == [["u 1", "a"]]
    source.interactions = tmp_path / "events.jsonl"
    source.interactions.write_text('{"user_id": " u", "item_id": "a", "timestamp": 1}')
    assert source.load().interactions["user_id"].tolist() == [" u"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_large_numbers_with_missing_values_are_exact(tmp_path, kind):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / f"events.{kind}"
    big = 2**53 + 1
    table = pd.DataFrame({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": [1, 2], "session": pd.array([1, None], dtype="Int64")})
    table["user_id"] = pd.array([big, big + 1], dtype="Int64")
    table.to_parquet(source.interactions) if kind == "parquet" else table.to_json(source.interactions, orient="records", lines=True)
    assert source.load().interactions["user_id"].tolist() == [str(big), str(big + 1)]
    table["user_id"] = pd.array([big, None], dtype="Int64")
    table.to_parquet(source.interactions) if kind == "parquet" else table.to_json(source.interactions, orient="records", lines=True)
    with pytest.raises(ValueError, match=r"(row|line) 2, field user_id: the id is empty"):
        source.load()


@pytest.mark.parametrize("value", [1.5, 2.0**53])
def test_numbers_that_are_not_exact_integers_are_an_error_with_the_row(tmp_path, value):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.parquet"
    pd.DataFrame({"user_id": [1.0, value], "item_id": ["a", "b"], "timestamp": [1, 2]}).to_parquet(source.interactions)
    with pytest.raises(ValueError, match=r"events.parquet, row 2, field user_id: the number .* is not an exact integer"):
        source.load()


@pytest.mark.parametrize("dtype", ["float32", "Float32", "float16"])
def test_inexact_numbers_of_narrow_dtypes_are_an_error(tmp_path, dtype):
    """Three ids that the file itself has made one."""
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.parquet"
    numbers = [2047, 2049, 2050] if dtype == "float16" else [2**24 - 1, 2**24 + 1, 2**24 + 2]
    column = pd.Series(numbers).astype(dtype)
    pd.DataFrame({"user_id": column, "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]}).to_parquet(source.interactions)
    with pytest.raises(ValueError, match=r"events.parquet, row 2, field user_id: the number .* is not an exact integer"):
        source.load()


@pytest.mark.parametrize("swapped", [False, True])
def test_integer_ids_stored_as_floats_in_one_table_are_an_error(tmp_path, swapped):
    source = events_csv(tmp_path, "user_id,item_id,timestamp\nu,1.0,1\nu,2.0,2\n")
    source.items.write_text("item_id,title\n1,Heat\n2,Alien\n")
    if swapped:
        source = events_csv(tmp_path, "user_id,item_id,timestamp\nu,1,1\nu,2,2\n")
        source.items.write_text("item_id,title\n1.0,Heat\n2.0,Alien\n")
    name = "items.csv" if swapped else "events.csv"
    with pytest.raises(ValueError, match=rf"{name} has the item_id '1.0', but the other table has '1'; use one form in both"):
        source.load()


def test_blank_lines_of_json_count_in_line_numbers(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.jsonl"
    source.interactions.write_text('{"user_id": 1, "item_id": "a", "timestamp": 1}\n\n{"user_id": "", "item_id": "a", "timestamp": 1}\n')
    with pytest.raises(ValueError, match=r"events.jsonl, line 3, field user_id: the id is empty; give every row an id"):
        source.load()
    source.interactions.write_text("\n[1]\n")
    with pytest.raises(ValueError, match=r"events.jsonl, line 2: expected an object with a field for each column, got \[1\]"):
        source.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "user,item_id,timestamp\nu,a,1\n",
            r"events.csv: no column 'user_id' for user_id, only \['user', 'item_id', 'timestamp'\]; set its name",
        ),
        ("user_id,item_id,timestamp\nu,a,1\nu,b,soon\n", r"events.csv, line 3, field timestamp: cannot read 'soon'; give unix seconds or ISO 8601"),
        ("user_id,item_id,timestamp\nu,a,\n", r"events.csv, line 2, field timestamp: cannot read ''"),
        ("user_id,item_id,timestamp,rating\nu,a,1,good\n", r"events.csv, line 2, field rating: cannot read 'good'; give a finite number"),
        ("user_id,item_id,timestamp\nu,a,1\n,b,1\n", r"events.csv, line 3, field user_id: the id is empty"),
    ],
)
def test_errors_contain_file_line_and_field(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        events_csv(tmp_path, text).load()


@pytest.mark.parametrize(("name", "where"), [("events.jsonl", "line 2"), ("events.parquet", "row 2")])
def test_lines_and_rows_of_other_files(tmp_path, name, where):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / name
    table = pd.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": ["1", "soon"]})
    table.to_parquet(source.interactions) if name.endswith("parquet") else table.to_json(source.interactions, orient="records", lines=True)
    with pytest.raises(ValueError, match=f"{name}, {where}, field timestamp: cannot read 'soon'"):
        source.load()


def test_broken_json_lines(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.jsonl"
    source.interactions.write_text('{"user_id": 1}\n{"user\n')
    with pytest.raises(ValueError, match=r"events.jsonl, line 2: not JSON"):
        source.load()


def test_an_unknown_field_in_a_column_map(tmp_path):
    with pytest.raises(ValueError, match=r"interaction_columns has the unknown field 'usr'; the fields are \['user_id'"):
        Tables("a.csv", "b.csv", {"usr": "uid"})
    with pytest.raises(ValueError, match=r"item_columns has the unknown field 'name'"):
        Tables("a.csv", "b.csv", None, {"name": "title"})


def test_a_mapped_column_must_exist_even_if_it_is_optional(tmp_path):
    with pytest.raises(ValueError, match="no column 'stars' for rating"):
        events_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\n", interaction_columns={"rating": "stars"}).load()


def test_items_without_title_are_counted(tmp_path, caplog):
    tables = items_csv(tmp_path, "item_id,title\na,Heat\nb,\nc, \n").load()
    assert tables.items["title"].tolist() == ["Heat", "", ""]
    assert "items.csv: 2 items have no title (first: line 3, item_id b); they and their interactions are dropped" in caplog.text


def test_the_first_of_repeated_items_is_used(tmp_path, caplog):
    assert items_csv(tmp_path, "item_id,title\na,Heat\na,Cold\n").load().items["title"].tolist() == ["Heat"]
    assert "1 lines repeat an item_id; the first line of each is used" in caplog.text


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the file .*a.csv does not exist; give the path"):
        Tables(str(tmp_path / "a.csv"), "b.csv").load()
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.xlsx"
    source.interactions.write_text("")
    with pytest.raises(ValueError, match=r"events.xlsx: unknown format; give .csv"):
        source.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # An unquoted comma in the first data line, which once made the first column an index.
        (f"{EVENTS_HEAD}\nu,a,1,4,x\n", r"events.csv, line 2: 5 cells, but the first line names 4 columns"),
        (f"{EVENTS_HEAD}\nu,a,1,4\n\nu,b,2\n", r"events.csv, line 4: 3 cells, but the first line names 4 columns"),
        ("user_id,item_id,timestamp\nu,a,1,4\nu,b,2,4\n", r"line 2: 4 cells, but the first line names 3 columns .*name every column"),
        (
            f'{EVENTS_HEAD}\nu,"a,1,4\nv,a,1,4\nw,a",1,4\n',
            r"events.csv, lines 2 to 4: a quoted cell contains what looks like a row",
        ),
        (f'{EVENTS_HEAD}\nu,"a,1,4\nv,a,1,4\n', r"events.csv, lines 2 to 3: a quoted cell has no closing quote"),
        (f'{EVENTS_HEAD}\nu,"a" b,1,4\n', r"events.csv, line 2: a quoted cell has text after its closing quote"),
        (f"{EVENTS_HEAD}\nu,a,inf,4\n", r"events.csv, line 2, field timestamp: cannot read 'inf'"),
        (f"{EVENTS_HEAD}\nu,a,1,4\nu,b,1,-Infinity\n", r"events.csv, line 3, field rating: cannot read '-Infinity'"),
        (f"{EVENTS_HEAD}\nu,a,1e999,4\n", r"events.csv, line 2, field timestamp: cannot read '1e999'"),
        (f"{EVENTS_HEAD}\nu,a\0,1,4\n", r"events.csv, line 2: a NUL character"),
        ("user_id,user_id,item_id,timestamp\n", r"events.csv, line 1: two columns are named 'user_id'"),
        ("user_id:item_id:timestamp\nu:a:1\n", r"events.csv: no column 'user_id' for user_id, only \['user_id:item_id:timestamp'\]"),
        ("customer;item_id,timestamp\nu;a,1\n", r"events.csv: no column 'user_id' for user_id, only \['customer;item_id', 'timestamp'\]"),
        (
            "user_id;item_id,timestamp\nu;a,1\n",
            r"events.csv: the delimiter of 'user_id;item_id,timestamp' is ambiguous: ',' or ';'; set the option `delimiter` of the source",
        ),
        ("customer;sku|when\nu;a|1\n", r"events.csv: the delimiter of 'customer;sku\|when' is ambiguous: ';' or '\|'; set the option"),
        ("customer;sku;when\nu;a;1\n", r"events.csv: no column 'user_id' for user_id, only \['customer', 'sku', 'when'\]; set its name"),
        ("", r"events.csv is empty; its first line must name the columns"),
        (f"{EVENTS_HEAD}\ru,a,1,4\r", r"events.csv, line 1: a cell contains a carriage return"),
    ],
)
def test_malformed_tables_are_an_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        events_csv(tmp_path, text).load()


def test_long_titles_in_messages_keep_their_quotes(tmp_path):
    long = "The Lord of the Rings, the Return of the King, extended and restored (2003)"
    (conflict,) = items_csv(tmp_path, f'item_id,title\na,"{long}"\na,Heat\n')._load_items()[1][1:]
    assert "e.g. a: 'The Lord of the Rings, the ...extended and restored (2003)' in line 2 and 'Heat' in line 3)" in conflict


def test_an_id_with_two_titles_is_reported(tmp_path, caplog):
    _, notes = items_csv(tmp_path, "item_id,title\na,Heat\nb,Alien\na,Heat \nb,Aliens\n")._load_items()
    assert notes == (
        "2 rows of items.csv repeat an item_id (e.g. a), the first row of each is used",
        "1 item_ids of items.csv have several titles (e.g. b: 'Alien' in line 3 and 'Aliens' in line 5), the first title is used",
    )
    assert notes[1] in caplog.text


@pytest.mark.parametrize("value", ["true", "[]", "{}", "null", "1" + 400 * "0"])
@pytest.mark.parametrize("field", ["timestamp", "rating"])
def test_values_of_json_that_are_no_numbers(tmp_path, value, field):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.jsonl"
    fields = {"user_id": '"u"', "item_id": '"a"', "timestamp": "1", "rating": "4", field: value}
    source.interactions.write_text("{" + ",".join(f'"{name}": {own}' for name, own in fields.items()) + "}")
    if (field, value) == ("rating", "null"):
        assert source.load().interactions["rating"].isna().all()
        return
    with pytest.raises(ValueError, match=rf"events.jsonl, line 1, field {field}: cannot read"):
        source.load()


def test_genres_are_split_at_the_given_delimiter(tmp_path):
    rows = 'item_id,title,genres\na,Heat,Crime\nb,Alien,"Horror, Sci-Fi,"\nc,Brazil,Comedy|Drama\n'
    source = items_csv(tmp_path, rows, genre_delimiter=",")
    assert source.load().items["genres"].tolist() == [("Crime",), ("Horror", "Sci-Fi"), ("Comedy|Drama",)]
    default = items_csv(tmp_path, rows)
    assert default.load().items["genres"].tolist() == [("Crime",), ("Horror, Sci-Fi,",), ("Comedy", "Drama")]
    assert source.settings() != default.settings()
    with pytest.raises(ValueError, match="genre_delimiter must not be empty"):
        Tables("a.csv", "b.csv", genre_delimiter="")


@pytest.mark.parametrize("field", ["title", "genres"])
def test_fields_of_items_of_other_types(tmp_path, field):
    source = events_csv(tmp_path, f"{EVENTS_HEAD}\nu,a,1,4\n")
    source.items = tmp_path / "items.jsonl"
    source.items.write_text(json.dumps({"item_id": "a", "title": "Heat", "genres": [], field: {"x": 1}}))
    with pytest.raises(ValueError, match=rf"items.jsonl, line 1, field {field}: "):
        source.load()
