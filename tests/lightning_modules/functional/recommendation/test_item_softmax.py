"""Cross-entropy over all items in chunks: values and gradients of the dense computation, in any chunk size and precision."""

import math

import pytest
import torch

from malleable.lightning_modules.functional.recommendation.item_softmax import item_cross_entropy


def parts(positions=17, items=29, dim=8):
    torch.manual_seed(0)
    states, table = torch.randn(positions, dim, requires_grad=True), torch.randn(items, dim, requires_grad=True)
    target, weight = torch.randint(items, (positions,)), torch.rand(positions)
    weight[3] = 0
    return states, table, target, weight


def dense(states, table, target, weight):
    return -((states @ table.T).log_softmax(1).gather(1, target[:, None])[:, 0] * weight).sum()


@pytest.mark.parametrize("chunk", [1, 4, 17, 100, None])
def test_loss_and_gradients_equal_the_dense_ones(chunk):
    states, table, target, weight = parts()
    expected = dense(states, table, target, weight)
    gradients = torch.autograd.grad(3 * expected, (states, table))
    found = item_cross_entropy(states, table, target, weight, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(3 * found, (states, table)), gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_uniform_scores_give_the_logarithm_of_the_number_of_items():
    states, table, target, weight = parts()
    found = item_cross_entropy(torch.zeros_like(states), table, target, weight / weight.sum())
    assert found.item() == pytest.approx(math.log(29), rel=1e-6)


def test_only_one_side_may_need_a_gradient():
    states, table, target, weight = parts()
    (expected,) = torch.autograd.grad(dense(states, table, target, weight), table)
    (found,) = torch.autograd.grad(item_cross_entropy(states.detach(), table, target, weight, 5), table)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not item_cross_entropy(states, table, target, weight).requires_grad


def test_large_scores_do_not_overflow():
    states, table, target, weight = parts()
    found = item_cross_entropy(1000 * states, table, target, weight)
    torch.testing.assert_close(found, dense(1000 * states, table, target, weight))
    assert found.isfinite()


def test_half_precision_products_are_near_the_dense_loss():
    states, table, target, weight = parts()
    expected = dense(states, table, target, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = item_cross_entropy(states, table, target, weight, 5)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    gradient = torch.autograd.grad(found, table)[0]
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), torch.autograd.grad(expected, table)[0].flatten(), 0) > 0.999


def test_small_gradients_do_not_underflow_in_half_precision():
    """Weights are about one over the number of positions, and probabilities one over the number of items."""
    torch.manual_seed(0)
    states, table = 0.1 * torch.randn(256, 8), (0.1 * torch.randn(5000, 8)).requires_grad_()
    target, weight = torch.randint(5, (256,)), torch.full((256,), 1 / 256)
    (expected,) = torch.autograd.grad(item_cross_entropy(states, table, target, weight), table)
    with torch.autocast("cpu", torch.float16):
        (found,) = torch.autograd.grad(item_cross_entropy(states, table, target, weight), table)
    others = slice(5, None)  # items that are no target
    assert (found[others] - expected[others]).norm() < 0.05 * expected[others].norm()


def test_no_gradient_is_computed_without_need():
    states, table, target, weight = parts()
    with torch.no_grad():
        found = item_cross_entropy(states, table, target, weight)
    assert found.grad_fn is None
    torch.testing.assert_close(found, dense(states, table, target, weight).detach())
