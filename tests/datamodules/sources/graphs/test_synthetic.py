import numpy as np
import pytest

from malleable.datamodules.graphs.report import report
from malleable.datamodules.sources.graphs.synthetic import SyntheticGraph


def test_the_relations_have_their_patterns():
    tables = SyntheticGraph().load()
    assert (len(tables.entities), tables.relations) == (66, ["after next", "in", "next", "opposite", "previous"])
    rows = np.concatenate(list(tables.triples.values()))
    pairs = {name: {(h, t) for h, r, t in rows.tolist() if r == key} for key, name in enumerate(tables.relations)}
    following = dict(pairs["next"])
    assert pairs["after next"] == {(h, following[t]) for h, t in pairs["next"]}
    assert pairs["previous"] < {(t, h) for h, t in pairs["next"]}
    assert len(pairs["previous"]) == 30
    assert pairs["opposite"] == {(t, h) for h, t in pairs["opposite"]}
    assert len({t for _, t in pairs["in"]}) == 6


def test_held_out_triples_have_known_entities_and_are_not_in_training():
    found = report(SyntheticGraph().load())
    assert found.triples == {"train": 216, "val": 27, "test": 27}
    assert found.unseen == {"val": 0, "test": 0}
    assert found.symmetric == ["opposite"]
    assert list(found.warnings()) == []


def test_settings_determine_the_graph():
    source = SyntheticGraph(num_stations=20, seed=1)
    first, again, other = source.load(), source.load(), SyntheticGraph(num_stations=20, seed=2).load()
    assert np.array_equal(first.triples["test"], again.triples["test"])
    assert not np.array_equal(first.triples["test"], other.triples["test"])
    assert source.files() == []
    assert source.settings() == {"num_stations": 20, "num_districts": 6, "holdout": (0.1, 0.1), "seed": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stations": 7}, "num_stations must be even and >= 6, got 7"),
        ({"num_districts": 0}, "num_districts must be between 1 and num_stations .60., got 0"),
        ({"holdout": (0.6, 0.5)}, "holdout must be two shares >= 0 with a sum < 1"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticGraph(**arguments)
