"""Delimiters, encodings and ratings of users' tables."""

import gzip
import json

import pandas as pd
import pytest
from small_tables import EVENTS_HEAD, events_csv, items_csv

from malleable.datamodules.sources.recommendation.tables import Tables


def test_quotes_in_tsv_are_ordinary_characters(tmp_path):
    source = events_csv(tmp_path, f"{EVENTS_HEAD}\nu,a,1,4\n")
    source.items = tmp_path / "items.tsv"
    source.items.write_text('item_id\ttitle\na\t"Great Performances" Cats\nb\t"Heat\nc\tAlien"\nd\t"The ""Best"" Of"\n')
    assert source.load().items["title"].tolist() == ['"Great Performances" Cats', '"Heat', 'Alien"', 'The "Best" Of']


def test_quoted_cells_with_commas_and_line_breaks(tmp_path):
    tables = items_csv(tmp_path, 'item_id,about,title\na,"A film,\nlong, and loud","Heat, again"\nb,,Alien\n').load()
    assert tables.items["title"].tolist() == ["Heat, again", "Alien"]


@pytest.mark.parametrize(
    ("encoding", "option"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252"), ("latin-1", "latin-1")],
)
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "json"])
def test_encodings(tmp_path, encoding, option, kind):
    (tmp_path / "events.csv").write_text(f"{EVENTS_HEAD}\nu,a,1,4\n", encoding=encoding)
    text = "\n\nitem_id,title\r\n\n a ,Misérables\r\n" if "csv" in kind else '\n{"item_id": "a", "title": "Misérables"}\n\n'
    data = (f"[{text}]" if kind == "json" else text).encode(encoding)
    items = tmp_path / f"items.{kind}"
    items.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert Tables(str(tmp_path / "events.csv"), str(items), encoding=option).load().items["title"].tolist() == ["Misérables"]
    if encoding != "utf-16-le":
        tables = Tables(str(tmp_path / "events.csv"), str(items)).load()
        assert tables.items["title"].tolist() == ["Misérables"]
        used = {"latin-1": "CP1252", "utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
        detected = () if used == "UTF-8" else (f"items.{kind} has encoding {used} (detected)",)
        assert tables.notes[-1:] == detected


def test_detected_formats_are_in_the_notes(tmp_path):
    source = events_csv(tmp_path, "user_id;item_id;timestamp\nu;a;1.5\n")
    source.items = tmp_path / "items.tsv"
    source.items.write_bytes("item_id|title\r\na|Heat, again\r\n".encode("utf-16"))
    tables = source.load()
    assert tables.items["title"].tolist() == ["Heat, again"]
    assert tables.notes == ("events.csv has delimiter ';' (detected)", "items.tsv has delimiter '|', encoding UTF-16 (detected)")
    assert source.text_format() == (";", None)
    assert source.settings() == events_csv(tmp_path, "").settings()
    source = events_csv(tmp_path, "user_id\titem_id\ttimestamp\nu\ta\t1\n")
    assert source.load().notes == ("events.csv has delimiter tab (detected)",)
    assert events_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\n").load().notes == ()


def test_given_options_win(tmp_path):
    source = events_csv(tmp_path, "user_id;item_id;timestamp\nu;a;1\n", delimiter=",")
    with pytest.raises(ValueError, match=r"events.csv, line 1: there is only one column, 'user_id;item_id;timestamp'; set the option `delimiter`"):
        source.load()
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\nu,a,1\n")
    (tmp_path / "items.csv").write_bytes("item_id,title\na,Чай\n".encode("cp1251"))
    source = Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), encoding="cp1251")
    assert source.load().items["title"].tolist() == ["Чай"]
    (tmp_path / "items.csv").write_bytes("item_id,title\na,Зелёный чай\n".encode("cp1251"))
    with pytest.raises(
        ValueError, match=r"items.csv, line 2: not text in UTF-8, and its encoding is ambiguous: cp1252 \('.*'\) or cp1251 \('Зелёный'\)"
    ):
        Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv")).load()


def test_a_given_encoding_of_a_file_in_utf_8_is_reported_once(tmp_path, caplog):
    source = items_csv(tmp_path, "item_id,title\na,Heat\nb,Les Misérables\n", encoding="cp1252")
    notes = source.load().notes
    assert notes == (
        f"{tmp_path / 'items.csv'}: the file is text in UTF-8, but is read in the given encoding cp1252: 'Misérables' in line 3 is read as "
        "'MisÃ©rables'; omit the option `encoding`",
    )
    assert [record.message for record in caplog.records] == list(notes)
    for content, encoding in (("a,Misérables", "cp1252"), ("a,Heat", "latin-1"), ("a,Misérables", "utf-8"), ("a,Misérables", "utf-16")):
        source = Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), encoding=encoding if encoding != "utf-16" else "cp1252")
        (tmp_path / "items.csv").write_bytes(f"item_id,title\n{content}\n".encode(encoding))
        assert not [note for note in source.load().notes if "omit" in note]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"])
def test_missing_ratings_are_kept(tmp_path, kind):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / f"events.{kind}"
    table = pd.DataFrame({"user_id": ["u"] * 3, "item_id": ["a", "b", "a"], "timestamp": [1, 2, 3], "rating": pd.array([4, None, 2], dtype="Int64")})
    if kind == "parquet":
        table.to_parquet(source.interactions)
    elif kind.startswith("json"):
        table.to_json(source.interactions, orient="records", lines=kind == "jsonl")
    else:
        table.to_csv(source.interactions, index=False, sep="\t" if kind == "tsv" else ",")
    ratings = source.load().interactions["rating"]
    assert ratings.isna().tolist() == [False, True, False]
    assert ratings.dropna().tolist() == [4, 2]


def test_missing_fields_and_empty_strings_of_json_are_missing_ratings(tmp_path):
    source = events_csv(tmp_path, "")
    source.interactions = tmp_path / "events.jsonl"
    rows = [{"rating": 5}, {}, {"rating": " "}, {"rating": None}]
    source.interactions.write_text("\n".join(json.dumps({"user_id": "u", "item_id": "a", "timestamp": 1} | row) for row in rows))
    assert source.load().interactions["rating"].isna().tolist() == [False, True, True, True]


@pytest.mark.parametrize("value", ["NaN", "n/a", "-"])
def test_a_rating_that_is_not_a_number_is_an_error(tmp_path, value):
    with pytest.raises(
        ValueError, match=rf"events.csv, line 3, field rating: cannot read '{value}'; give a finite number, or leave the rating empty"
    ):
        events_csv(tmp_path, f"{EVENTS_HEAD}\nu,a,1,\nu,b,2,{value}\n").load()


def test_delimiters(tmp_path):
    source = events_csv(tmp_path, "user_id;item_id;timestamp\nu;a;1\n", delimiter=";")
    source.items.write_text("item_id;title\na;Heat, again\n")
    assert source.load().items["title"].tolist() == ["Heat, again"]
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(ValueError, match="delimiter must be one character"):
            Tables("a.csv", "b.csv", delimiter=wrong)
    with pytest.raises(ValueError, match="encoding: 'klingon' is unknown"):
        Tables("a.csv", "b.csv", encoding="klingon")


def test_another_delimiter_after_a_quoted_cell_is_reported(tmp_path):
    with pytest.raises(
        ValueError, match=r"events.csv, line 1: a quoted cell has text after .*; or set the option `delimiter` to ';', if cells are separated by it"
    ):
        events_csv(tmp_path, '"user_id";"item_id";"timestamp"\n"u";"a";1\n', delimiter=",").load()
