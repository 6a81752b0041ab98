"""Counts by hand on toy graphs, and the published ones on real graphs."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from shared import shared_data

from malleable.datamodules.graphs.report import GraphReport, both_directions, report
from malleable.datamodules.sources.graphs.base import number
from malleable.datamodules.sources.graphs.triples import Triples


def chain(relation, count, start=0, swap=False):
    return [((f"e{k + 1}", relation, f"e{k}") if swap else (f"e{k}", relation, f"e{k + 1}")) for k in range(start, start + count)]


def examined(train, val=(), test=()) -> GraphReport:
    return report(number({"train": train, "val": val, "test": test}))


def test_both_directions():
    assert both_directions(np.array([[0, 1, 2], [3, 0, 4]]), 2).tolist() == [[0, 1, 2], [2, 3, 0], [3, 0, 4], [4, 2, 3]]


def test_counts():
    found = examined([("a", "r", "b"), ("a", "r", "c"), ("a", "r", "b")], [("a", "r", "b"), ("d", "r", "a")], [("b", "q", "c")])
    assert (found.entities, found.relations, found.triples) == (4, 2, {"train": 3, "val": 2, "test": 1})
    assert found.repeated == {"train": 1, "val": 0, "test": 0}
    assert found.known == {"val": 1, "test": 0}
    assert found.unseen == {"val": 1, "test": 1}
    assert found.unseen_entities == 1
    # (a, r, ?), (?, r, b), (?, r, c); the first has two answers.
    assert (found.queries, found.largest_answer) == (3, 2)
    text = "\n".join([*(f"{name}: {text}" for name, text in found.facts()), *found.warnings()])
    assert "4 entities, 2 relations, 3 / 2 / 1 triples (train / val / test)" in text
    assert "3 distinct training queries (50.0% of all), a query has at most 2 answers" in text
    assert "duplicate triples: 1 of train, 0 of val, 0 of test" in text
    assert "triples that are in training, too: 1 of val, 0 of test" in text


def test_an_inverse_relation_leaks():
    """Half of the tests are the reverse of a training triple of the inverse relation."""
    train = chain("hypernym", 20) + chain("hyponym", 18, swap=True) + chain("other", 30, start=40)
    found = examined(train, test=[("e19", "hyponym", "e18"), ("e41", "other", "e44")])
    (twin,) = found.twins
    assert (twin.relation, twin.other, twin.reversed) == ("hypernym", "hyponym", True)
    assert twin.share == pytest.approx(19 / 20)
    assert found.leaked == {"val": 0, "test": 1}
    (warning,) = found.warnings()
    assert "0.0% of val, 50.0% of test follow from a training triple by hypernym inverts hyponym (95%)" in warning
    assert "WN18, FB15k" in warning


def test_a_duplicate_relation_leaks():
    found = examined(chain("plays", 20) + chain("affiliated", 19), test=[("e19", "affiliated", "e20")])
    assert [(twin.relation, twin.other, twin.reversed, twin.share) for twin in found.twins] == [("affiliated", "plays", False, 1.0)]
    assert found.leaked["test"] == 1
    assert "affiliated repeats plays (100%)" in next(iter(found.warnings()))


def test_a_symmetric_relation_is_no_leak():
    """As WN18RR's: worth knowing, and part of the task."""
    found = examined(chain("near", 20) + chain("near", 19, swap=True), test=[("e20", "near", "e19")])
    assert (found.symmetric, found.twins, found.leaked["test"]) == (["near"], [], 0)
    assert list(found.warnings()) == []
    assert dict(found.facts())["symmetric relations"] == "near"


def test_relations_below_the_threshold_are_not_twins():
    found = examined(chain("a", 20) + chain("b", 15, swap=True), test=[("e1", "b", "e0")])
    assert found.twins == []


def test_a_report_is_restored_from_plain_data():
    found = examined(chain("a", 20) + chain("b", 20, swap=True), [("e0", "a", "e1")])
    assert GraphReport.from_plain(json.loads(json.dumps(asdict(found)))) == found


# The specification's table; Nations and Kinship there are files whose first column is the relation.
MEASURED = {
    "WN18RR": (40_943, 11, (86_835, 3_034, 3_134), (210, 210), 103_509, 473),
    "FB15k-237": (14_541, 237, (272_115, 17_535, 20_466), (9, 28), 149_689, 3_612),
    "umls": (135, 46, (5_216, 652, 661), (0, 0), 1_560, 115),
    "kinship": (129, 104, (8_548, 1_069, 1_069), (0, 0), 10_218, 23),
    "nations": (70, 14, (1_619, 202, 203), (0, 0), 658, 27),
    "codex-s": (2_034, 42, (32_888, 1_827, 1_828), (0, 0), None, None),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_real_graphs(name):
    entities, relations, triples, unseen, queries, largest = MEASURED[name]
    found = report(Triples(str(shared_data(f"kg/{name}"))).load())
    assert (found.entities, found.relations) == (entities, relations)
    assert tuple(found.triples.values()) == triples
    assert tuple(found.unseen.values()) == unseen
    if queries is not None:
        assert (found.queries, found.largest_answer) == (queries, largest)
    assert not any(found.repeated.values())


@pytest.mark.parametrize("name", ["WN18RR", "FB15k-237", "codex-s"])
def test_graphs_without_leaks(name):
    found = report(Triples(str(shared_data(f"kg/{name}"))).load())
    assert list(found.warnings()) == []


def test_columns_of_other_copies():
    """Kinship has 104 people and 25 terms of kinship, which these files put first."""
    tables = Triples(str(shared_data("kg/kinship")), columns="rht").load()
    assert (len(tables.entities), len(tables.relations)) == (104, 25)
    tables = Triples(str(shared_data("kg/nations")), columns="rht").load()
    assert len(tables.entities) == 14
