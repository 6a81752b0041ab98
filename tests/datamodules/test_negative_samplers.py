from collections import Counter

import pytest

from malleable.datamodules.negative_samplers import Hardest, ItemSampler, Mixture, Popularity, RowItems, Semantic, Uniform


def test_samples_are_distinct_and_not_excluded():
    sampler = ItemSampler(range(20))
    for row in range(200):
        drawn = sampler.draw(row, 5, exclude=[0, 1, 2])
        assert len(set(drawn)) == 5
        assert not set(drawn) & {0, 1, 2}


def test_a_draw_depends_on_seed_and_row_alone():
    draws = [ItemSampler(range(1000), seed=3).draw(row, 4, ()) for row in range(50)]
    again = ItemSampler(range(1000), seed=3)
    assert [again.draw(row, 4, ()) for row in reversed(range(50))] == draws[::-1]
    assert [ItemSampler(range(1000), seed=4).draw(row, 4, ()) for row in range(50)] != draws
    assert len({tuple(draw) for draw in draws}) == 50


def test_uniform_draws_are_uniform():
    counts = Counter(ItemSampler(range(4)).draw(row, 1, [3])[0] for row in range(6000))
    # Standard deviation of a count: sqrt(6000 * 1/3 * 2/3) = 37.
    assert all(abs(counts[item] - 2000) < 150 for item in range(3))


def test_weighted_draws_follow_the_weights_and_never_take_weight_0():
    counts = Counter(ItemSampler(range(3), [1, 3, 0]).draw(row, 1, ())[0] for row in range(4000))
    assert abs(counts[1] - 3000) < 150
    assert counts[2] == 0


def test_the_last_possible_items_are_found():
    sampler = ItemSampler(range(500), [1.0] + [1e-9] * 498 + [0.0])
    assert set(sampler.draw(0, 3, exclude=range(3, 500))) == {0, 1, 2}


def test_too_few_items_are_an_error():
    with pytest.raises(ValueError, match="row 7 needs 3 sampled items, but only 2 can be sampled: its own 2 items are excluded; reduce"):
        ItemSampler(range(5), [1, 1, 1, 1, 0]).draw(7, 3, exclude=[0, 1])


def test_drawing_among_candidates_keeps_their_weights():
    sampler = ItemSampler(range(5), [0, 1, 2, 3, 0])
    assert {sampler.among([1, 4]).draw(row, 1, ())[0] for row in range(20)} == {1}
    # Without any popular candidate the draw is uniform.
    assert {sampler.among([0, 4]).draw(row, 1, ())[0] for row in range(50)} == {0, 4}


def test_positions_cover_all_values():
    assert {ItemSampler(range(5)).draw_position(row, 4) for row in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "num_negatives must be >= 1, got 0"),
        (lambda: Semantic(num_negatives=3, pool=2), "pool 2 must be at least num_negatives 3"),
        (lambda: Mixture(1, [Uniform()]), "a Mixture needs at least two parts, got 1"),
        (lambda: Mixture(1, [Uniform(), Uniform()], [1]), "weights must be 2 numbers >= 0, one for each part and not all 0"),
        (lambda: Mixture(1, [Uniform(), Popularity(2)]), "num_negatives is 1 in the Mixture, but 2 in its part Popularity"),
        (lambda: Semantic().bind(3, (), 0), "Semantic needs a model, which a data module does not have"),
        (lambda: Mixture(1, [Uniform(), Hardest()]).bind(3, (), 0), "Hardest needs a model"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_items_without_interactions_are_not_sampled_for_any_exponent():
    sampler = Popularity(2, exponent=0.5).bind(4, [4, 0, 9, 1], 0)
    assert {item for row in range(50) for item in sampler(RowItems(row, ()))} == {0, 2, 3}


def test_a_mixture_draws_for_each_row_from_one_part():
    mixture = Mixture(2, [Uniform(2), Popularity(2)])
    bound = mixture.bind(50, list(range(50)), 7)
    parts = [part.bind(50, list(range(50)), 7) for part in mixture.parts]
    for row in range(30):
        assert bound(RowItems(row, ())) == parts[mixture.choose(row, 7)](RowItems(row, ()))
