"""EASE: the closed form, and the inverse in place."""

import pytest
import torch

from malleable.lightning_modules.functional.recommendation.ease import ease_weights, invert_in_place


def gram(users=60, items=23):
    torch.manual_seed(0)
    x = (torch.rand(users, items, dtype=torch.float64) < 0.3).double()
    return x.T @ x, x


@pytest.mark.parametrize("block", [1, 4, 5, 23, 100])
def test_the_inverse_in_place_equals_that_of_a_library(block):
    matrix = gram()[0] + torch.eye(23)
    expected = torch.linalg.inv(matrix)
    invert_in_place(matrix, block)
    torch.testing.assert_close(matrix, expected)


def test_weights_are_the_minimum_of_the_penalised_error():
    """The gradient of the error is 0, apart from the diagonal."""
    table, x = gram()
    weights = ease_weights(table, 2.0, block=7)
    assert (weights.diagonal() == 0).all()
    gradient = x.T @ (x @ weights - x) + 2.0 * weights
    gradient.fill_diagonal_(0)
    assert gradient.abs().max() < 1e-9


def test_single_precision_is_enough():
    table, _ = gram()
    torch.testing.assert_close(ease_weights(table.float(), 2.0), ease_weights(table.clone(), 2.0).float(), rtol=0, atol=1e-5)


def test_memory_of_the_table_is_reused():
    table, _ = gram()
    assert ease_weights(table, 1.0).data_ptr() == table.data_ptr()
