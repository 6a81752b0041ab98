from malleable.datamodules.sources.graph import GraphTables, number

TRAIN, TEST = [("b", "r", "a"), ("a", "q", "a")], [("c", "r", "b")]


def test_the_vocabulary_is_that_of_all_splits_in_alphabetical_order():
    tables = number({"train": TRAIN, "test": TEST})
    assert isinstance(tables, GraphTables)
    assert (tables.entities, tables.relations) == (["a", "b", "c"], ["q", "r"])
    assert {split: triples.tolist() for split, triples in tables.triples.items()} == {"train": [[1, 1, 0], [0, 0, 0]], "test": [[2, 1, 1]]}


def test_the_order_of_lines_does_not_matter():
    assert number({"train": TRAIN, "test": TEST}).entities == number({"test": TEST, "train": TRAIN[::-1]}).entities
