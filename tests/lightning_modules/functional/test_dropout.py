"""Dropout by random bytes: frequencies, scale, gradient, and no effect in evaluation."""

import pytest
import torch

from malleable.lightning_modules.functional.dropout import ByteDropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_frequencies_and_scale(p):
    torch.manual_seed(0)
    values = torch.ones(1000, 203, requires_grad=True)
    out = ByteDropout(p)(values)
    rounded = round(p * 256) / 256
    kept = out > 0
    assert abs(kept.float().mean() - (1 - rounded)) < 4 * (rounded * (1 - rounded) / values.numel()) ** 0.5
    assert out[kept].unique().item() == pytest.approx(1 / (1 - rounded))
    share = kept.flatten()[: values.numel() // 8 * 8].view(-1, 8).float().mean(0)
    assert (share - (1 - rounded)).abs().max() < 0.02, "each byte of a number is random"
    out.sum().backward()
    assert torch.equal(values.grad, out.detach())


def test_a_seed_determines_the_mask():
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(ByteDropout(0.3)(torch.ones(17)))
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], ByteDropout(0.3)(torch.ones(17)))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p):
    assert torch.equal(ByteDropout(p)(torch.ones(5)), torch.full((5,), 1 - p))


def test_evaluation_changes_nothing():
    values = torch.randn(4, 5)
    assert ByteDropout(0.5).eval()(values) is values
