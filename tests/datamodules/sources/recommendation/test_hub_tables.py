"""Tables that `datasets` reads, from local folders and without a network."""

import json
import re

import pandas as pd
import pytest

from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.sources.recommendation.hub_tables import HubTable, HubTables

EVENTS = [("u1", "007", 10.0, 4.0), ("u2", "NA", 20.0, 5.0), ("u2", "007", 30.0, 3.0)]
ITEMS = [("007", "Heat", ("Crime", "Drama")), ("NA", "None", ())]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` builds out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    return tmp_path / "films"


def write(folder, kind):
    events = pd.DataFrame(EVENTS, columns=["user_id", "item_id", "timestamp", "rating"])
    items = pd.DataFrame({"item_id": [i for i, _, _ in ITEMS], "title": [t for _, t, _ in ITEMS], "genres": [list(g) for _, _, g in ITEMS]})
    if kind == "parquet":
        events.to_parquet(folder / "events.parquet")
        items.to_parquet(folder / "items.parquet")
    elif kind == "jsonl":
        events.to_json(folder / "events.jsonl", orient="records", lines=True)
        items.to_json(folder / "items.jsonl", orient="records", lines=True)
    else:
        events.to_csv(folder / "events.csv", index=False)
        items.assign(genres=["Crime | Drama", ""]).to_csv(folder / "items.csv", index=False)
    return HubTable(str(folder), data_files=f"events.{kind}"), HubTable(str(folder), data_files=f"items.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_tables(folder, kind):
    source = HubTables(*write(folder, kind))
    tables = source.load()
    assert [tuple(row) for row in tables.interactions.itertuples(index=False)] == EVENTS
    assert [tuple(row) for row in tables.items.itertuples(index=False)] == ITEMS
    assert len(source.files()) == 2
    assert all(path.suffix == ".arrow" for path in source.files())


def test_configurations_and_splits(folder):
    write(folder, "parquet")
    settings = [{"config_name": "ratings", "data_files": "events.parquet"}, {"config_name": "films", "data_files": "items.parquet"}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(settings)}\n---\n")
    source = HubTables(HubTable(str(folder), "ratings", split="train[:2]"), HubTable(str(folder), "films"))
    tables = source.load()
    assert tables.interactions["item_id"].tolist() == ["007", "NA"]
    assert source.settings() != HubTables(HubTable(str(folder), "ratings"), HubTable(str(folder), "films")).settings()


def test_a_path_is_a_table_with_default_options(tmp_path):
    for name, columns in {"events": ["user_id", "item_id", "timestamp"], "items": ["item_id", "title"]}.items():
        (tmp_path / name).mkdir()
        pd.DataFrame([["1"] * len(columns)], columns=columns).to_parquet(tmp_path / name / "part.parquet")
    assert HubTables(str(tmp_path / "events"), str(tmp_path / "items")).load().items["title"].tolist() == ["1"]


def test_columns_of_other_names_and_other_types(folder):
    pd.DataFrame({"who": [1, None], "what": [5, 6], "when": pd.to_datetime(["1970-01-02", "1970-01-01"], utc=True)}).astype({"who": "Int64"}).fillna(
        {"who": 2**53 + 1}
    ).to_parquet(folder / "events.parquet")
    pd.DataFrame({"what": [5, 6], "title": ["Heat", "Alien"]}).to_parquet(folder / "items.parquet")
    names = {"item_id": "what"}
    source = HubTables(
        HubTable(str(folder), data_files="events.parquet"),
        HubTable(str(folder), data_files="items.parquet"),
        names | {"user_id": "who", "timestamp": "when"},
        names,
    )
    assert source.load().interactions.to_dict("list") == {"user_id": ["1", str(2**53 + 1)], "item_id": ["5", "6"], "timestamp": [86_400.0, 0.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"timestamp": [1.0, float("inf")]},
            r"dataset .*films \(data_files events.parquet, split train\), row 2, field timestamp: cannot read .*inf",
        ),
        ({"user_id": ["u", None]}, r"row 2, field user_id"),
        ({"who": ["u", "v"], "user_id": None}, r"no column 'user_id' for user_id, only .*set its name with interaction_columns"),
    ],
)
def test_errors_name_dataset_row_and_column(folder, change, message):
    columns = {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1.0, 2.0]} | change
    pd.DataFrame({name: values for name, values in columns.items() if values is not None}).to_parquet(folder / "events.parquet")
    pd.DataFrame({"item_id": ["a", "b"], "title": ["Heat", "Alien"]}).to_parquet(folder / "items.parquet")
    source = HubTables(HubTable(str(folder), data_files="events.parquet"), HubTable(str(folder), data_files="items.parquet"))
    with pytest.raises(ValueError, match=message):
        source.load()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"split": "tset"}, "Unknown split"),
        ({"data_files": "nothing.parquet"}, "nothing.parquet"),
        ({"config": "small"}, "small"),
        ({"data_files": "notes.txt"}, "its files are not CSV, TSV, JSON lines, Parquet or Arrow"),
        ({"path": "nobody/nothing"}, "nobody/nothing"),
        ({"data_files": None}, "All the data files must have the same columns|Couldn't cast .*item_id"),
        ({"data_files": "damaged.parquet"}, "Parquet"),
    ],
)
def test_what_cannot_be_opened(folder, table, message):
    events, items = write(folder, "parquet")
    (folder / "notes.txt").write_text("a\nb\n")
    if table.get("data_files") == "damaged.parquet":
        (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(40))
    wrong = HubTable(**{**vars(events), **table})
    with pytest.raises(ValueError, match=rf"{re.escape(str(wrong))} cannot be opened \(.*(?:{message}).*give a folder or the id"):
        HubTables(wrong, items, local_files_only=True).load()


def test_no_code_of_a_dataset_is_run(folder):
    events, items = write(folder, "parquet")
    (folder / "films.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="scripts are no longer supported"):
        HubTables(events, items).load()
    assert not (folder / "ran").exists()


def test_a_data_module_reads_them(folder):
    events = [(f"u{user}", f"f{(user + step) % 6}", 10.0 * step) for user in range(8) for step in range(6)]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]).to_parquet(folder / "events.parquet")
    pd.DataFrame({"item_id": [f"f{n}" for n in range(6)], "title": [f"Film {n}" for n in range(6)]}).to_parquet(folder / "items.parquet")
    source = HubTables(HubTable(str(folder), data_files="events.parquet"), HubTable(str(folder), data_files="items.parquet"))
    data = RecommendationDataModule(source, vocab_size=280)
    data.prepare_data()
    data.setup("fit")
    assert data.catalog.titles == tuple(f"Film {n}" for n in range(6))
    assert len(data.train_dataset) > 0
