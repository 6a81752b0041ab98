"""Draws of negative items: frequencies of each sampler, dependence on the key only, and lookup of earlier items."""

import numpy as np
import pytest
import torch

from malleable.datamodules import negative_samplers as samplers
from malleable.datamodules.negative_samplers import Mixture, RowItems, Uniform
from malleable.lightning_modules.functional.recommendation.item_draws import EarlierItems, ItemProposal

POPULARITY = (40, 0, 5, 15, 20, 1, 9, 30)
COUNT = 20_000
# 99.99 % quantile of chi-square by degrees of freedom.
QUANTILES = {6: 27.9, 7: 29.9}
SAMPLERS = {
    "uniform": (Uniform(), [1] * 8),
    "popularity": (samplers.Popularity(), POPULARITY),
    "popularity to the power of 0.75": (samplers.Popularity(exponent=0.75), [count**0.75 for count in POPULARITY]),
    "exponent 0": (samplers.Popularity(exponent=0.0), [float(count > 0) for count in POPULARITY]),
    "mixture": (
        Mixture(parts=[Uniform(), samplers.Popularity()], weights=[1.0, 3.0]),
        [0.25 / 8 + 0.75 * count / sum(POPULARITY) for count in POPULARITY],
    ),
}


def chi_square(items, weights):
    """Statistic of the counts of items against weights, and its degrees of freedom."""
    share = np.array(weights, dtype=float) / sum(weights)
    counts = np.bincount(items, minlength=len(weights))
    assert counts[share == 0].sum() == 0
    expected = share[share > 0] * counts.sum()
    return float(((counts[share > 0] - expected) ** 2 / expected).sum()), int((share > 0).sum()) - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_of_positions_have_the_frequencies_of_the_sampler(name):
    sampler, weights = SAMPLERS[name]
    proposal = ItemProposal(8, sampler.item_weights(8, POPULARITY))
    items = proposal.draw(torch.arange(COUNT // 4), 4).flatten()
    statistic, freedom = chi_square(items.numpy(), weights)
    assert statistic < QUANTILES[freedom]
    expected = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(proposal.log_prob(torch.arange(8)).exp(), (expected / expected.sum()).float())


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_of_rows_have_the_frequencies_of_the_sampler(name):
    sampler, weights = SAMPLERS[name]
    bound = sampler.bind(8, POPULARITY, seed=3)
    items = np.array([bound(RowItems(sample_id, ())) for sample_id in range(COUNT // 4)]).flatten()
    statistic, freedom = chi_square(items, weights)
    assert statistic < QUANTILES[freedom]


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_never_get_their_target_or_an_earlier_item(name):
    bound = SAMPLERS[name][0].bind(8, POPULARITY, seed=3)
    assert not {item for sample_id in range(500) for item in bound(RowItems(sample_id, (0, 3)))} & {0, 3}


def test_draws_depend_on_the_seed_only():
    proposal = ItemProposal(1000, None)
    seeds = torch.arange(50)
    items = proposal.draw(seeds, 6)
    assert torch.equal(proposal.draw(seeds.flip(0), 6).flip(0), items)
    assert torch.equal(proposal.draw(seeds[7:9], 3), items[7:9, :3])
    assert len(items.unique()) > 200


def test_items_without_weight_at_the_end_are_never_drawn():
    items = ItemProposal(6, [1, 0, 3, 0, 0, 0]).draw(torch.arange(2000), 2)
    assert set(items.flatten().tolist()) == {0, 2}


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.0, 0.0, 0.0]])
def test_weights_that_cannot_be_used_are_refused(weights):
    with pytest.raises(ValueError, match="expected a weight for each of 3 items, at least one of them > 0"):
        ItemProposal(3, weights)


@pytest.mark.parametrize("sampler", [samplers.Semantic(), samplers.Hardest(), samplers.SelfPlay()])
def test_samplers_that_need_a_model_have_no_weights(sampler):
    with pytest.raises(ValueError, match="use Uniform, Popularity or a Mixture of them"):
        sampler.item_weights(8, POPULARITY)


def test_popularity_without_counts_is_uniform():
    assert samplers.Popularity().item_weights(3, ()) is None
    assert samplers.Popularity().item_weights(3, (0, 0, 0)) is None


def test_earlier_items_equal_a_loop():
    torch.manual_seed(0)
    items = torch.randint(6, (3, 9))
    items[0, 7:] = -1
    sequence = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2, [2] * 9, [3] * 5 + [4] * 4])
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0], list(range(9)), [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    lookup = EarlierItems(items, sequence, position, 6)
    real = sequence >= 0
    found = lookup.contains(sequence[real], position[real], torch.arange(6).expand(int(real.sum()), -1))
    flat = list(zip(sequence[real].tolist(), position[real].tolist(), items[real].tolist(), strict=True))
    expected = [[any(s == own and p <= place and i == item for s, p, i in flat) for item in range(6)] for own, place, _ in flat]
    assert found.tolist() == expected
