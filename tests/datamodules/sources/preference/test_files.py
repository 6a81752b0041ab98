"""Formats of files of preferences, data sets that `datasets` reads, and synthetic questions."""

import json

import pandas as pd
import pytest
from readers import registry

from malleable.datamodules.sources.preference.files import PreferenceFile
from malleable.datamodules.sources.preference.hub import HubPreferences
from malleable.datamodules.sources.preference.synthetic import SyntheticPreferences

ROWS = [{"prompt": f"Question {n}, with a comma?", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(4)]
TURNS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [row["rejected"]],
    }
    for row in ROWS
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` builds out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def contents(rows):
    return [(row.prompt, row.answers) for row in rows]


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.tsv", "f.parquet", "f.jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    registry.write_table(tmp_path / name, ROWS)
    source = PreferenceFile(str(tmp_path / name), val=str(tmp_path / name))
    tables = source.load()
    expected = [(row["prompt"], (row["chosen"], row["rejected"])) for row in ROWS]
    assert contents(tables.rows["train"]) == contents(tables.rows["val"]) == expected
    assert tables.rows["train"][1].place.startswith(f"{tmp_path / name}, ")
    assert source.files() == [tmp_path / name] * 2


def test_conversations_and_several_answers_in_parquet_equal_those_in_json(tmp_path):
    for name in ("f.jsonl", "f.parquet"):
        registry.write_table(tmp_path / name, TURNS)
    one, other = (PreferenceFile(str(tmp_path / name)).load().rows["train"] for name in ("f.jsonl", "f.parquet"))
    assert contents(one) == contents(other)
    assert one[0].prompt[0].role == "user"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", "", "f.jsonl has no rows; give a file with at least one row with prompt, chosen and rejected"),
        ("f.jsonl", json.dumps(ROWS[0]) + "\n{", "f.jsonl, line 2: not JSON"),
        ("f.csv", "prompt,chosen,rejected\na,b\n", "f.csv, line 2: 2 cells, but the first line names 3 columns"),
        ("f.csv", "question,chosen,rejected\na,b,c\n", "f.csv, line 2: the field 'prompt' is missing"),
        ("f.parquet", "no table", "f.parquet is damaged, or not a Parquet file"),
        ("f.xml", "", "f.xml: unknown format; give .jsonl, .json, .csv"),
    ],
)
def test_unusable_files_are_errors_that_name_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        PreferenceFile(str(tmp_path / name)).load()


def test_other_columns_only_are_an_error(tmp_path):
    registry.write_table(tmp_path / "f.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"f.parquet, row 1: expected prompt, .* the fields are question, answer"):
        PreferenceFile(str(tmp_path / "f.parquet")).load()


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"the file nothing.jsonl does not exist; give a file that ends in .jsonl"):
        PreferenceFile("nothing.jsonl").files()


def test_data_sets_of_the_hub_and_of_save_to_disk_give_the_rows_of_files(tmp_path):
    from datasets import Dataset, DatasetDict

    frame = pd.DataFrame(ROWS)
    (tmp_path / "table").mkdir()
    frame.to_parquet(tmp_path / "table/train.parquet")
    Dataset.from_list(TURNS).save_to_disk(tmp_path / "saved")
    DatasetDict(train_prefs=Dataset.from_list(TURNS[:3]), test_prefs=Dataset.from_list(TURNS[3:])).save_to_disk(tmp_path / "splits")
    registry.write_table(tmp_path / "plain.jsonl", ROWS)
    registry.write_table(tmp_path / "turns.jsonl", TURNS)
    plain, turns = (contents(PreferenceFile(str(tmp_path / name)).load().rows["train"]) for name in ("plain.jsonl", "turns.jsonl"))
    assert contents(HubPreferences(str(tmp_path / "table")).load().rows["train"]) == plain
    saved = HubPreferences(str(tmp_path / "saved"))
    assert contents(saved.load().rows["train"]) == turns
    assert all(path.suffix == ".arrow" for path in saved.files())
    splits = HubPreferences(str(tmp_path / "splits"), "train_prefs", test="test_prefs").load().rows
    assert {name: contents(rows) for name, rows in splits.items()} == {"train": turns[:3], "test": turns[3:]}


def test_errors_of_data_sets_name_them(tmp_path):
    from datasets import Dataset, DatasetDict

    with pytest.raises(ValueError, match=r"dataset nobody/nothing .* cannot be opened"):
        HubPreferences("nobody/nothing", local_files_only=True).files()
    DatasetDict(train=Dataset.from_list([{"prompt": "P", "chosen": "a"}])).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"dataset .*saved \(split test\) cannot be opened \(it has the splits train, not test\)"):
        HubPreferences(str(tmp_path / "saved"), "test").files()
    with pytest.raises(ValueError, match=r"saved \(split train\), row 1: the field 'rejected' is missing"):
        HubPreferences(str(tmp_path / "saved")).load()
    with pytest.raises(ValueError, match="a folder of save_to_disk has no revision"):
        HubPreferences(str(tmp_path / "saved"), revision="main").files()


def test_synthetic_questions_are_deterministic_and_distinct():
    (rows,) = SyntheticPreferences(600, seed=3).load().rows.values()
    assert rows == SyntheticPreferences(600, seed=3).load().rows["train"]
    assert rows != SyntheticPreferences(600, seed=4).load().rows["train"]
    assert len({(row.prompt, *row.answers) for row in rows}) == 600
    assert len({row.prompt for row in rows}) > 250
    assert all(row.answers[0] != row.answers[1] for row in rows)
    unpaired = SyntheticPreferences(200, unpaired=True).load().rows["train"]
    assert {row.desirable for row in unpaired} == {True, False}
    assert {len(row.answers) for row in unpaired} == {1}
    with pytest.raises(ValueError, match=r"num_rows must be between 1 and 2784, got 3000"):
        SyntheticPreferences(3000)
