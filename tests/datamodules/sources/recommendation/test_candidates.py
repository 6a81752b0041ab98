import json
from pathlib import Path

import pytest
from shared import shared_data

from malleable.datamodules.sources.recommendation.candidates import CandidateRows

ROW = {"historyList": "Boris::Björk", "itemList": ["Kent", "Nobody", "Low"], "trueSelection": "Low"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "id2name.txt").write_text("7::Boris\n3::Björk\n5::Low\n9::Kent: the :: band\n1::Kent\n", encoding="utf-8")
    (tmp_path / "val.json").write_text(json.dumps([ROW, ROW | {"historyList": ["Who", "Kent"]}]))
    (tmp_path / "train_seq.jsonl").write_text('{"history":[7,3],"next":9}\n{"history":[4],"next":2}\n')
    return tmp_path


def test_rows_of_names_and_of_ids(folder):
    source = CandidateRows(str(folder))
    ready = source.load()
    assert ready.items["title"].tolist() == ["Boris", "Björk", "Low", "Kent: the :: band", "Kent"]
    assert {split: [tuple(row) for row in rows] for split, rows in ready.rows.items()} == {
        "train": [([0, 1], 3, ()), ([-1], -1, ())],
        "val": [([0, 1], 2, [4, -1, 2]), ([-1, 4], 2, [4, -1, 2])],
    }
    assert [path.name for path in source.files()] == ["train_seq.jsonl", "val.json", "id2name.txt"]


def test_a_target_that_is_not_a_candidate_is_an_error(folder):
    (folder / "val.json").write_text(json.dumps([ROW, ROW | {"trueSelection": "Boris"}]))
    with pytest.raises(ValueError, match=r"val.json, entry 2: trueSelection 'Boris' is not in itemList"):
        CandidateRows(str(folder)).load()


def test_a_missing_field_and_a_missing_catalogue(folder):
    (folder / "val.json").write_text('[{"historyList": ""}]')
    with pytest.raises(ValueError, match=r"val.json, entry 1: the field 'trueSelection' is missing"):
        CandidateRows(str(folder)).load()
    (folder / "id2name.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no catalogue; expected id2name.txt"):
        CandidateRows(str(folder)).files()


def test_counts_of_the_published_files():
    ready = CandidateRows(str(shared_data("rec/lastfm_cans20"))).load()
    assert len(ready.items) == 4606
    assert {split: len(rows) for split, rows in ready.rows.items()} == {"train": 50_800, "val": 2767, "test": 2495}
    assert sum(len(row.history) >= 3 for row in ready.rows["train"]) == 47_872
    assert {len(row.candidates) for split in ("val", "test") for row in ready.rows[split]} == {20}
    assert {split: sum(row.target < 0 for row in ready.rows[split]) for split in ("train", "val", "test")} == {"train": 0, "val": 7, "test": 6}
