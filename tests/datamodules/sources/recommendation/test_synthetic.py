from itertools import pairwise

import pytest

from malleable.datamodules.recommendation.splits import Split, prepare
from malleable.datamodules.sources.recommendation.synthetic import Synthetic


def test_the_same_seed_gives_the_same_tables():
    first, again, other = (Synthetic(seed=seed).load() for seed in (1, 1, 2))
    assert first.interactions.equals(again.interactions)
    assert first.items.equals(again.items)
    assert not first.interactions.equals(other.interactions)


def test_sizes_and_distinct_titles():
    tables = Synthetic(num_users=30, num_items=40, num_events=8, num_genres=5).load()
    assert len(tables.interactions) == 30 * 8
    assert tables.items["title"].nunique() == 40
    assert {genre for genres in tables.items["genres"] for genre in genres} == {"Drama", "Comedy", "Mystery", "Western", "Fantasy"}
    assert not tables.interactions.duplicated(["user_id", "item_id"]).any()


def test_the_next_item_is_predictable():
    """The next part of the series is right far more often than the most popular item."""
    data = prepare(Synthetic().load(), Split())
    pairs = [(int(a), int(b)) for items in data.sequences for a, b in pairwise(items)]
    follows = sum(b == a + 4 for a, b in pairs) / len(pairs)
    popular = data.popularity().max() / data.popularity().sum()
    assert follows > 0.5
    assert follows > 5 * popular
    assert data.popularity().max() > 3 * data.popularity().mean() / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_genres": 7}, "num_genres must be between 1 and 6, got 7"),
        ({"num_items": 500}, r"num_items must be between num_genres \(4\) and 182, got 500"),
        ({"num_events": 16}, r"num_events must be between 2 and the items of a genre \(15\), got 16"),
        ({"persistence": 1.5}, r"persistence must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(**arguments)


def test_settings_identify_the_data():
    assert Synthetic(seed=1).settings() != Synthetic(seed=2).settings()
    assert Synthetic().files() == []
