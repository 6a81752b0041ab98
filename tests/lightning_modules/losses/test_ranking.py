"""Losses over items: dense references, calibration, left-out negatives, chunks."""

import math

import pytest
import torch
from torch.nn import functional as F

from malleable import BCE, BPR, CE, GBCE, ItemLoss, SampledCE
from malleable.lightning_modules.losses import ranking
from malleable.lightning_modules.losses.ranking import Negatives, default_item_loss
from malleable.lightning_modules.serialization import object_from_plain

P, N, D = 11, 30, 6


class Given:
    """Negatives that are given."""

    def __init__(self, items, log_expected=None, earlier=None, is_target=None):
        none = torch.zeros_like(items, dtype=torch.bool)
        self.all = Negatives(items, torch.zeros(items.shape) if log_expected is None else log_expected, none if earlier is None else earlier, none)
        if is_target is not None:
            self.all = self.all._replace(is_target=is_target)
        self.count = items.shape[1]

    def __call__(self, rows):
        return Negatives(*(part[rows] for part in self.all))


def parts():
    torch.manual_seed(0)
    states, table = torch.randn(P, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    return states, table, torch.randint(N, (P,)), torch.rand(P)


def scores_of(states, table, target, items):
    scores = states @ table.T
    return scores.gather(1, target[:, None])[:, 0], scores.gather(1, items)


def test_ce_is_minus_the_logarithm_of_the_softmax():
    states, table, target, weight = parts()
    expected = (F.cross_entropy(states @ table.T, target, reduction="none") * weight).sum()
    torch.testing.assert_close(CE()(states, table, target, weight), expected)


def test_sampled_ce_with_all_other_items_is_ce():
    """With log(k q) = 0, every item counts once."""
    states, table, target, weight = parts()
    others = torch.tensor([[item for item in range(N) if item != own] for own in target.tolist()])
    torch.testing.assert_close(SampledCE()(states, table, target, weight, Given(others)), CE()(states, table, target, weight))


def test_sampled_ce_is_a_consistent_estimate():
    """Many negatives drawn in proportion to any weights give nearly the cross-entropy over all items."""
    states, table, target, weight = parts()
    share = torch.rand(N) + 0.2
    share /= share.sum()
    items = torch.multinomial(share, 200_000, replacement=True).view(1, -1).expand(P, -1)
    # Draws of the target are left out of the sum, and the others estimate the sum over all other items.
    given = Given(items, share[items].log() + math.log(items.shape[1]), is_target=items == target[:, None])
    found = SampledCE()(states, table, target, weight, given)
    assert found.item() == pytest.approx(CE()(states, table, target, weight).item(), rel=5e-3)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_gbce_without_calibration_is_bce(k):
    states, table, target, weight = parts()
    items = torch.randint(N, (P, k))
    found = GBCE(t=0.0)(states, table, target, weight, Given(items))
    positive, negative = scores_of(states, table, target, items)
    expected = (-positive.sigmoid().log() - (1 - negative.sigmoid()).log().sum(1)) * weight
    torch.testing.assert_close(found, expected.sum())
    torch.testing.assert_close(BCE()(states, table, target, weight, Given(items)), found)


@pytest.mark.parametrize("t", [0.25, 1.0])
def test_gbce_weights_the_positive_term(t):
    states, table, target, weight = parts()
    items = torch.randint(N, (P, 4))
    alpha = 4 / (N - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    assert t != 1.0 or beta == pytest.approx(alpha)
    positive, negative = scores_of(states, table, target, items)
    expected = ((-beta * positive.sigmoid().log() - (1 - negative.sigmoid()).log().sum(1)) * weight).sum()
    torch.testing.assert_close(GBCE(t=t)(states, table, target, weight, Given(items)), expected, rtol=1e-6, atol=1e-6)


def test_bpr_is_the_mean_over_negatives():
    states, table, target, weight = parts()
    items = torch.randint(N, (P, 4))
    positive, negative = scores_of(states, table, target, items)
    expected = (-(positive[:, None] - negative).sigmoid().log().mean(1) * weight).sum()
    torch.testing.assert_close(BPR()(states, table, target, weight, Given(items)), expected)


@pytest.mark.parametrize("loss", [GBCE(), BCE(), BPR()])
def test_earlier_items_have_no_effect(loss):
    states, table, target, weight = parts()
    items = torch.randint(N, (P, 4))
    earlier = torch.rand(P, 4) < 0.5
    other = torch.where(earlier, (items + 1) % N, items)
    assert loss(states, table, target, weight, Given(items, earlier=earlier)) == loss(states, table, target, weight, Given(other, earlier=earlier))
    assert loss(states, table, target, weight, Given(items)) != loss(states, table, target, weight, Given(other))


@pytest.mark.parametrize("loss", [SampledCE(), GBCE(), BCE(), BPR()])
def test_chunks_change_neither_loss_nor_gradient(loss, monkeypatch):
    states, table, target, weight = parts()
    given = Given(torch.randint(N, (P, 4)))
    whole = loss(states, table, target, weight, given)
    gradients = torch.autograd.grad(whole, (states, table))
    monkeypatch.setattr(ranking, "CHUNK", {"cpu": 3 * 4 * D, "cuda": 1})
    found = loss(states, table, target, weight, given)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(found, (states, table)), gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [CE(), SampledCE(), GBCE(t=0.5), BCE(), BPR()])
def test_a_loss_is_rebuilt_from_plain_data(loss):
    rebuilt = object_from_plain(ItemLoss, loss.as_plain())
    assert type(rebuilt) is type(loss)
    assert getattr(rebuilt, "t", None) == getattr(loss, "t", None)


def test_a_loss_without_its_negatives_is_refused():
    with pytest.raises(ValueError, match="BPR needs negatives"):
        BPR()(*parts())


def test_calibration_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got 1.5"):
        GBCE(t=1.5)


def test_the_default_loss_depends_on_the_number_of_items():
    assert type(default_item_loss(50_000)) is CE
    assert type(default_item_loss(50_001)) is GBCE
