"""Second moments of keys: equal for all divisions of the keys, and accurate beside very long keys."""

import pytest
import torch

from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

D = 24


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_moment_is_the_mean_outer_product():
    keys = draw(9000, D).float()
    whole, parts = SecondMoment(D), SecondMoment(D)
    whole.add(keys)
    for part in keys.split(37):
        parts.add(part)
    expected = keys.double().T @ keys.double() / len(keys)
    torch.testing.assert_close(whole.mean(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-6)
    assert whole.count == parts.count == 9000


def test_moment_preserves_small_directions_beside_a_massive_key():
    keys = draw(20000, 4).float() * 1e-3
    keys[:, 0] = 0
    keys[0, 0] = 3e4
    moment = SecondMoment(4)
    moment.add(keys)
    expected = keys[:, 1:].double().square().mean(0)
    torch.testing.assert_close(moment.mean().diagonal()[1:], expected, rtol=1e-4, atol=0)


def test_moment_without_finite_keys_raises():
    with pytest.raises(ValueError, match="no keys"):
        SecondMoment(3).mean()
    moment = SecondMoment(3)
    moment.add(torch.tensor([[1.0, torch.inf, 0.0]]))
    with pytest.raises(ValueError, match="not finite"):
        moment.mean()
