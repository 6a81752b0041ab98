import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from malleable.datamodules.sources.graphs.base import GraphTables
from malleable.datamodules.sources.graphs.triples import Triples, hold_out

SPLITS = {"train": [(0, 0, 1), (1, 1, 2), (2, 0, 0)], "valid": [(1, 0, 2)], "test": [(3, 1, 0)]}
ENTITIES, RELATIONS = ["ann", "bo b", "cy", "dee"], ["likes", "near"]


def labelled(rows):
    return [(ENTITIES[h], RELATIONS[r], ENTITIES[t]) for h, r, t in rows]


def text(rows, order=(0, 1, 2)) -> str:
    return "".join("\t".join(str(row[column]) for column in order) + "\n" for row in rows)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The same five triples in every format."""
    folders = {name: tmp_path / name for name in ("labels", "gz", "parquet", "ids_hrt", "openke")}
    for folder in folders.values():
        folder.mkdir()
    for split, rows in SPLITS.items():
        (folders["labels"] / f"{split}.tsv").write_text(text(labelled(rows)))
        (folders["gz"] / f"{'dev' if split == 'valid' else split}.txt.gz").write_bytes(gzip.compress(text(labelled(rows)).encode()))
        columns = dict(zip(("head", "relation", "tail"), map(list, zip(*labelled(rows), strict=True)), strict=True))
        parquet.write_table(pa.table(columns), folders["parquet"] / f"{split}.parquet")
        (folders["ids_hrt"] / f"{split}2id.txt").write_text(text(rows))
        (folders["openke"] / f"{split}2id.txt").write_text(f"{len(rows)}\n" + text(rows, (0, 2, 1)).replace("\t", " "))
    for name, labels in (("entity", ENTITIES), ("relation", RELATIONS)):
        (folders["ids_hrt"] / f"{name}2id.txt").write_text(text(zip(labels, range(9), [""] * 9, strict=False), (0, 1)))
        (folders["openke"] / f"{name}2id.txt").write_text(f"{len(labels)}\n" + text(zip(labels, range(9), [""] * 9, strict=False), (0, 1)))
    return folders


@pytest.mark.parametrize("name", ["labels", "gz", "parquet", "ids_hrt", "openke"])
def test_all_formats_give_the_same_graph(folders, name):
    source = Triples(str(folders[name]), format=name if name in ("ids_hrt", "openke") else "labels")
    tables = source.load()
    assert (tables.entities, tables.relations) == (ENTITIES, RELATIONS)
    assert {split: [tuple(row) for row in rows.tolist()] for split, rows in tables.triples.items()} == {
        {"valid": "val"}.get(split, split): rows for split, rows in SPLITS.items()
    }
    assert [path.name.partition(".")[0].removesuffix("2id") for path in source.files()][:3:2] == ["train", "test"]


def test_an_openke_file_read_as_ids_hrt_is_an_error(folders):
    with pytest.raises(
        ValueError, match=r"entity2id.txt, line 1: 1 column in '4', expected 2: .*files of format openke have a first line with the number of lines"
    ):
        Triples(str(folders["openke"]), format="ids_hrt").load()
    with pytest.raises(ValueError, match=r"entity2id.txt, line 1, which must be the number of the following lines"):
        Triples(str(folders["ids_hrt"]), format="openke").load()


def test_another_order_of_columns(folders):
    for path in folders["labels"].iterdir():
        path.write_text(text([line.split("\t") for line in path.read_text().splitlines()], (1, 0, 2)))
    assert Triples(str(folders["labels"]), columns="rht").load().entities == ENTITIES
    assert Triples(str(folders["labels"])).load().entities != ENTITIES


def test_settings_depend_on_the_files(folders):
    settings = Triples(str(folders["labels"])).settings()
    (folders["labels"] / "valid.tsv").rename(folders["labels"] / "extra.tsv")
    assert settings["splits"] == ["train", "val", "test"]
    assert Triples(str(folders["labels"])).settings()["splits"] == ["train", "test"]


def test_one_file_is_split_without_unseen_entities(tmp_path):
    generator = np.random.default_rng(1)
    rows = [(f"e{h}", f"r{r}", f"e{t}") for h, r, t in generator.integers(0, (30, 3, 30), (400, 3))]
    rows += [("rare", "r0", "e0"), ("e0", "once", "e1"), *rows[:5]]
    (tmp_path / "all.tsv").write_text("head\trelation\ttail\n" + text(rows))
    source = Triples(str(tmp_path / "all.tsv"), header=True, holdout=(0.1, 0.2), seed=3)
    tables = source.load()
    distinct = len(set(rows))
    sizes = {split: len(triples) for split, triples in tables.triples.items()}
    assert sizes == {"train": distinct - round(0.1 * distinct) - round(0.2 * distinct), "val": round(0.1 * distinct), "test": round(0.2 * distinct)}
    assert len(np.unique(np.concatenate(list(tables.triples.values())), axis=0)) == distinct
    assert set(tables.triples["train"][:, [0, 2]].ravel()) == set(range(len(tables.entities)))
    assert set(tables.triples["train"][:, 1]) == set(range(len(tables.relations)))
    again, other = source.load(), Triples(str(tmp_path / "all.tsv"), header=True, holdout=(0.1, 0.2), seed=4)
    assert all(np.array_equal(again.triples[split], tables.triples[split]) for split in sizes)
    assert not np.array_equal(other.load().triples["test"], tables.triples["test"])
    assert source.settings() != other.settings()
    assert source.files() == [tmp_path / "all.tsv"]


def test_a_graph_that_cannot_be_split_is_not_split():
    tables = GraphTables(["a", "b"], ["r"], {"train": np.array([[0, 0, 1], [0, 0, 0]])})
    held = hold_out(tables, (0.4, 0.4), 0)
    assert {split: triples.tolist() for split, triples in held.triples.items()} == {"train": [[0, 0, 1]], "val": [], "test": [[0, 0, 0]]}


def test_missing_files(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a folder with train, valid and test, or one file"):
        Triples(str(tmp_path / "nowhere")).files()
    with pytest.raises(FileNotFoundError, match=r"labels has no file train2id; expected train2id with one of the suffixes .txt"):
        Triples(str(folders["labels"]), format="openke").files()
    (folders["openke"] / "relation2id.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no file relation2id"):
        Triples(str(folders["openke"]), format="openke").files()
    with pytest.raises(ValueError, match=r"train.tsv is one file, but format openke needs a folder with entity2id and relation2id"):
        Triples(str(folders["labels"] / "train.tsv"), format="openke").files()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "rdf"}, "format must be labels, ids_hrt or openke, got 'rdf'"),
        ({"columns": "hr"}, "columns must be a permutation of the letters h .head., r .relation. and t"),
        ({"column_names": {"subject": "s"}}, "column_names has the unknown field 'subject'; the fields are .'head', 'relation', 'tail'."),
        ({"holdout": (0.5, 0.5)}, "holdout must be two shares >= 0 with a sum < 1"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Triples("folder", **arguments)


def test_a_given_encoding_of_a_file_in_utf_8_is_reported(folders, caplog):
    path = folders["labels"] / "train.tsv"
    path.write_text(text(labelled(SPLITS["train"])) + "ann\tnear\tJosé\n", encoding="utf-8")
    Triples(str(folders["labels"])).load()
    assert not caplog.records
    Triples(str(folders["labels"]), encoding="latin-1").load()
    (record,) = caplog.records
    assert f"{path}: the file is text in UTF-8, but is read in the given encoding latin-1: 'José' in line 4 is read as 'JosÃ©'" in record.message
