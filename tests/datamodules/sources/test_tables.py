import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from malleable.datamodules.sources.tables import Tables

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


def events_csv(tmp_path: Path, text: str, **options) -> Tables:
    (tmp_path / "events.csv").write_text(text)
    (tmp_path / "items.csv").write_text("item_id,title\na,Heat\nb,Alien\n")
    return Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), **options)


def items_csv(tmp_path: Path, text: str) -> Tables:
    source = events_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\n")
    (tmp_path / "items.csv").write_text(text)
    return source


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


def test_whole_number_ids_beside_a_gap_stay_whole(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.parquet"
    pd.DataFrame({"user_id": [1.0, 2.0], "item_id": ["a", "b"], "timestamp": [1, 2]}).to_parquet(source.interactions)
    assert source.load().interactions["user_id"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "user,item_id,timestamp\nu,a,1\n",
            r"events.csv: no column 'user_id' for user_id, only \['user', 'item_id', 'timestamp'\]; name the right one",
        ),
        ("user_id,item_id,timestamp\nu,a,1\nu,b,soon\n", r"events.csv, line 3, field timestamp: cannot read 'soon'; give unix seconds or ISO 8601"),
        ("user_id,item_id,timestamp\nu,a,\n", r"events.csv, line 2, field timestamp: cannot read ''"),
        ("user_id,item_id,timestamp,rating\nu,a,1,good\n", r"events.csv, line 2, field rating: cannot read 'good'; give a number"),
        ("user_id,item_id,timestamp\nu,a,1\n,b,1\n", r"events.csv, line 3, field user_id: it is empty"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_line_and_field(tmp_path, text, message):
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
    with pytest.raises(ValueError, match=r"events.jsonl, line 2: no JSON"):
        source.load()


def test_an_unknown_field_in_a_column_map(tmp_path):
    with pytest.raises(ValueError, match=r"interaction_columns names the unknown field 'usr'; the fields are \['user_id'"):
        Tables("a.csv", "b.csv", {"usr": "uid"})
    with pytest.raises(ValueError, match=r"item_columns names the unknown field 'name'"):
        Tables("a.csv", "b.csv", None, {"name": "title"})


def test_a_mapped_column_must_exist_even_where_it_is_optional(tmp_path):
    with pytest.raises(ValueError, match="no column 'stars' for rating"):
        events_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\n", interaction_columns={"rating": "stars"}).load()


def test_an_item_without_title_is_a_counted_drop(tmp_path, caplog):
    tables = items_csv(tmp_path, "item_id,title\na,Heat\nb,\nc, \n").load()
    assert tables.items["title"].tolist() == ["Heat", "", " "]
    assert "items.csv: 2 items have no title (first: line 3, item_id b); they and their interactions are dropped" in caplog.text


def test_of_repeated_items_the_first_stays(tmp_path, caplog):
    assert items_csv(tmp_path, "item_id,title\na,Heat\na,Cold\n").load().items["title"].tolist() == ["Heat"]
    assert "1 lines repeat an item_id; the first of each stays" in caplog.text


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*a.csv; give the path"):
        Tables(str(tmp_path / "a.csv"), "b.csv").load()
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.xlsx"
    source.interactions.write_text("")
    with pytest.raises(ValueError, match=r"events.xlsx: unknown kind of file; give .csv"):
        source.load()
