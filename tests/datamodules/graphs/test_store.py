import numpy as np
import pytest
from toy_graph import toy_triples, write_toy_graph

from malleable.datamodules.graphs import store as module
from malleable.datamodules.graphs.store import GraphStore, build, fingerprint
from malleable.datamodules.sources.graphs.base import number
from malleable.datamodules.sources.graphs.triples import Triples


@pytest.fixture
def source(tmp_path) -> Triples:
    return Triples(str(write_toy_graph(tmp_path / "graph")))


def test_the_cache_restores_the_data(source, tmp_path):
    built = GraphStore.open_or_build(source, tmp_path / "cache")
    opened = GraphStore.open_or_build(source, tmp_path / "cache")
    assert opened.graph == built.graph
    assert opened.report == built.report
    assert all(np.array_equal(opened.queries[split], built.queries[split]) for split in ("train", "val", "test"))
    triples = {name: len(rows) for name, rows in toy_triples().items()}
    assert [len(rows) for rows in opened.queries.values()] == [2 * count for count in triples.values()]


def test_degree_counts_a_loop_once():
    arrays, _ = build(number({"train": [("a", "r", "a"), ("a", "r", "b"), ("c", "r", "c")], "test": [("b", "r", "c")]}))
    assert arrays["degree"].tolist() == [2, 1, 1]


def test_a_damaged_cache_is_built_again(source, tmp_path, caplog):
    GraphStore.open_or_build(source, tmp_path / "cache")
    path = tmp_path / "cache" / fingerprint(source) / "answer_tails.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    again = GraphStore.open_or_build(source, tmp_path / "cache")
    assert "is corrupt (answer_tails.npy): building it again" in caplog.text
    assert again.answers.tails.values.max() < again.graph.num_entities


def test_a_cache_that_cannot_be_read_back(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_arrays", lambda *_: None)
    with pytest.raises(OSError, match=r"cannot be read right after it was written; check the disk, or choose another cache_dir"):
        GraphStore.open_or_build(source, tmp_path / "cache")


def test_settings_and_format_are_part_of_the_fingerprint(source, tmp_path, monkeypatch):
    assert fingerprint(source) == fingerprint(Triples(str(tmp_path / "graph")))
    assert fingerprint(source) != fingerprint(Triples(str(tmp_path / "graph"), columns="thr"))
    before = fingerprint(source)
    monkeypatch.setattr(module, "FORMAT", 2)
    assert fingerprint(source) != before
