import numpy as np
import pytest

from malleable.datamodules.sources.graphs.base import GraphTables, number, pack

TRAIN, TEST = [("b", "r", "a"), ("a", "q", "a")], [("c", "r", "b")]


def test_the_vocabulary_is_that_of_all_splits_in_alphabetical_order():
    tables = number({"train": TRAIN, "test": TEST})
    assert isinstance(tables, GraphTables)
    assert (tables.entities, tables.relations) == (["a", "b", "c"], ["q", "r"])
    assert {split: triples.tolist() for split, triples in tables.triples.items()} == {"train": [[1, 1, 0], [0, 0, 0]], "test": [[2, 1, 1]]}


def test_the_order_of_lines_does_not_matter():
    assert number({"train": TRAIN, "test": TEST}).entities == number({"test": TEST, "train": TRAIN[::-1]}).entities


def test_packed_triples_have_the_order_and_equality_of_triples():
    triples = np.random.default_rng(0).integers(0, (5, 3, 5), (200, 3)).astype(np.int32)
    _, by_row = np.unique(triples, axis=0, return_index=True)
    _, by_code = np.unique(pack(triples, 5, 3), return_index=True)
    assert by_code.tolist() == by_row.tolist()
    assert pack(np.array([[4_999_999, 1999, 4_999_999]], dtype=np.int32), 5_000_000, 2000).tolist() == [5_000_000**2 * 2000 - 1]
    with pytest.raises(OverflowError, match="triples cannot be encoded in 64 bits"):
        pack(triples, 10**9, 100)
