import math

import pytest
import torch

from malleable.lightning_modules.metrics.exposure import ExposureMetrics, genre_weights, gini, popularity_groups, tail_items

GENRES = [("a",), ("a", "b"), ("b",), ("c",), ("a", "c"), ("b", "c")]
RECOMMENDED = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])
HISTORY = torch.tensor([[2, 4], [4, 5], [0, 1], [1, 3]])


def measured(metric, recommended=RECOMMENDED, history=HISTORY, sample_id=None):
    metric.update(recommended, history, torch.arange(len(recommended)) if sample_id is None else sample_id)
    return {name: value.item() for name, value in metric.compute().items()}


def test_golden_toy():
    result = measured(ExposureMetrics(6, ks=(2,), genres=GENRES))
    assert result["div_ratio_2"] == 0.5
    assert result["or_ratio_2"] == 0.875
    assert result["mgu_2"] == pytest.approx(0.125, abs=1e-7)
    assert result["dgu_2"] == pytest.approx(0.375, abs=1e-7)
    assert result["coverage_2"] == pytest.approx(4 / 6)
    assert result["valid_ratio_2"] == 1


def test_genre_shares_of_the_toy():
    weights = genre_weights(GENRES)
    recommended = torch.bincount(RECOMMENDED.flatten(), minlength=6).double() @ weights / 8
    history = torch.bincount(HISTORY.flatten(), minlength=6).double() @ weights / 8
    assert recommended.tolist() == [0.5625, 0.3125, 0.125]
    assert history.tolist() == [0.375, 0.3125, 0.3125]


def test_counted_genres_split_an_item_among_themselves_only():
    assert genre_weights([("a", "x"), ("a", "b"), ("x",), ("b", "b")], counted=("a", "b", "z")).tolist() == [
        [1, 0, 0],
        [0.5, 0.5, 0],
        [0, 0, 0],
        [0, 1, 0],
    ]


def test_gini_and_entropy_at_the_extremes():
    assert gini(torch.full((5,), 3)).item() == pytest.approx(0)
    assert gini(torch.tensor([0, 0, 0, 7])).item() == pytest.approx(1 - 1 / 4)
    uniform = measured(ExposureMetrics(4, ks=(1,)), torch.arange(4)[:, None], torch.arange(4)[:, None])
    assert uniform["gini_1"] == pytest.approx(0)
    assert uniform["entropy_1"] == pytest.approx(math.log(4))
    constant = measured(ExposureMetrics(4, ks=(1,)), torch.zeros(8, 1, dtype=torch.long), torch.zeros(8, 1, dtype=torch.long))
    assert constant["entropy_1"] == 0
    assert constant["or_ratio_1"] == 1
    assert constant["div_ratio_1"] == 1 / 8


def test_gini_equals_the_mean_absolute_difference():
    counts = torch.tensor([4.0, 0.0, 1.0, 1.0, 6.0])
    expected = (counts[:, None] - counts).abs().sum() / (2 * 5 * counts.sum())
    assert gini(counts).item() == pytest.approx(expected.item())


def test_popularity_figures_by_hand():
    popularity = [10, 4, 3, 2, 1, 0]
    result = measured(ExposureMetrics(6, ks=(2,), popularity=popularity, num_groups=3))
    # Counts: item 0 three times, 1 three times, 2 once, 3 once.
    assert result["arp_2"] == pytest.approx((30 + 12 + 3 + 2) / 8)
    # History: 0 once, 1 twice, 2 once, 3 once, 4 twice, 5 once.
    assert result["arp_ratio_2"] == pytest.approx((47 / 8) / ((10 + 8 + 3 + 2 + 2 + 0) / 8))
    # The head is ceil(6 / 5) = 2 items.
    assert result["aplt_2"] == pytest.approx(2 / 8)
    # Groups {0, 1}, {2, 3}, {4, 5}: recommended 6, 2, 0; history 3, 2, 3, of 8.
    assert result["pop_mgu_2"] == pytest.approx((3 / 8 + 0 + 3 / 8) / 3)
    assert result["pop_dgu_2"] == pytest.approx(6 / 8)


def test_tail_definitions():
    popularity = torch.tensor([1, 50, 20, 20, 5, 4]).double()
    assert tail_items(popularity).nonzero().flatten().tolist() == [0, 3, 4, 5]
    # 50 + 20 + 20 of 100 is the first sum that reaches 80.
    assert tail_items(popularity, "interactions").nonzero().flatten().tolist() == [0, 4, 5]


def test_popularity_groups_are_equally_large():
    membership = popularity_groups(torch.rand(100), 8)
    assert membership.sum(1).eq(1).all()
    assert set(membership.sum(0).tolist()) <= {12, 13}
    assert popularity_groups(torch.tensor([1.0, 2.0]), 8).tolist() == [[0, 1], [1, 0]]


def test_padding_slots_and_repeated_rows():
    recommended = torch.tensor([[0, -1], [1, 2], [3, 3]])
    result = measured(ExposureMetrics(5, ks=(1, 2)), recommended, torch.full((3, 4), -1), torch.tensor([7, 8, -9]))
    assert result["valid_ratio_2"] == 3 / 4
    assert result["div_ratio_2"] == 3 / 4
    assert result["div_ratio_1"] == 1
    assert result["coverage_2"] == pytest.approx(3 / 5)


def test_groups_without_history_are_not_a_number():
    assert math.isnan(measured(ExposureMetrics(6, ks=(2,), genres=GENRES), history=torch.full((4, 2), -1))["mgu_2"])


def test_equal_shares_are_fair():
    result = measured(ExposureMetrics(6, ks=(2,), genres=GENRES, popularity=range(6)), RECOMMENDED, RECOMMENDED)
    assert result["mgu_2"] == result["dgu_2"] == result["pop_mgu_2"] == 0
    assert result["arp_ratio_2"] == 1


def test_unknown_genres_and_popularity_leave_their_keys_out():
    for metric in (ExposureMetrics(6, ks=(2,)), ExposureMetrics(6, ks=(2,), genres=(), popularity=()), ExposureMetrics(6, ks=(2,), genres=[()] * 6)):
        assert set(measured(metric)) == {f"{name}_2" for name in ("div_ratio", "or_ratio", "coverage", "gini", "entropy", "valid_ratio")}


def test_bounds_hold_and_order_of_rows_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    recommended = torch.randint(40, (300, 10), generator=generator)
    history = torch.randint(-1, 40, (300, 7), generator=generator)
    genres = [tuple("abcd"[: 1 + item % 4]) for item in range(40)]
    metrics = [ExposureMetrics(40, ks=(1, 10), genres=genres, popularity=range(40)) for _ in range(2)]
    whole = measured(metrics[0], recommended, history)
    for rows in torch.randperm(300, generator=generator).split(11):
        metrics[1].update(recommended[rows], history[rows], rows)
    assert metrics[1].compute() == {name: torch.tensor(value) for name, value in whole.items()}
    assert 1 / 3000 <= whole["div_ratio_10"] <= 1
    assert whole["or_ratio_10"] >= 3 / 40
    assert whole["mgu_10"] <= whole["dgu_10"]


def test_item_counts_are_those_of_the_last_compute():
    metric = ExposureMetrics(6, ks=(1, 2))
    with pytest.raises(RuntimeError, match=r"available after compute\(\)"):
        metric.item_counts(2)
    measured(metric)
    metric.reset()
    assert metric.item_counts(1).tolist() == [3, 0, 0, 1, 0, 0]
    assert metric.item_counts(2).tolist() == [3, 3, 1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"k must be one of the cut-offs \(1, 2\), got 5"):
        metric.item_counts(5)


def test_refusals():
    with pytest.raises(ValueError, match="genres must have one entry for each of the 3 items, got 6"):
        ExposureMetrics(3, genres=GENRES)
    with pytest.raises(ValueError, match="popularity must have one entry for each of the 3 items, got 2"):
        ExposureMetrics(3, popularity=[1, 2])
    with pytest.raises(ValueError, match=r"no item has a genre of counted_genres \['z'\]"):
        ExposureMetrics(6, genres=GENRES, counted_genres=("z",))
    with pytest.raises(ValueError, match="tail must be 'items' or 'interactions', got 'long'"):
        ExposureMetrics(3, popularity=[1, 2, 3], tail="long")
    with pytest.raises(ValueError, match="recommended contains item 9, but the catalogue has items 0 to 5"):
        ExposureMetrics(6, ks=(1,)).update(torch.tensor([[9]]), torch.tensor([[0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="history contains item 6, but the catalogue"):
        ExposureMetrics(6, ks=(1,)).update(torch.tensor([[0]]), torch.tensor([[6]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"recommended must be \(B, K\) with K >= 10"):
        ExposureMetrics(6).update(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([0]))


def test_inputs_identify_genres_popularity_and_histories():
    def inputs(history=HISTORY, computed=True, **changes):
        metric = ExposureMetrics(6, ks=(2,), **({"genres": GENRES, "popularity": [5, 4, 3, 2, 1, 0]} | changes))
        if computed:
            measured(metric, history=history)
        return metric.inputs()

    own = inputs()
    assert own == inputs()
    assert set(own) == {"mgu", "dgu", "pop_mgu", "pop_dgu", "arp", "arp_ratio", "aplt"}
    assert own["mgu"]["genres"].startswith("3 (")
    assert own["mgu"].keys() == {"genres", "histories"}
    assert own["arp"].keys() == {"popularity"}
    assert inputs(computed=False)["mgu"].keys() == {"genres"}
    other = inputs(genres=[("a",), *GENRES[1:-1], ("a", "c")])
    assert {name for name in own if own[name] != other[name]} == {"mgu", "dgu"}
    other = inputs(popularity=[5, 4, 3, 2, 0, 1])
    assert {name for name in own if own[name] != other[name]} == {"arp", "arp_ratio", "pop_mgu", "pop_dgu"}
    other = inputs(history=HISTORY.flip(0) * 0)
    assert {name for name in own if own[name] != other[name]} == {"mgu", "dgu", "pop_mgu", "pop_dgu", "arp_ratio"}
    assert inputs(genres=None, popularity=None) == {}
