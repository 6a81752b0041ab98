"""Equal to `log_softmax` in float32, forward and backward, without storing a float32 copy of the logits."""

import pytest
import torch

from malleable.lightning_modules.functional.language import selected_logps
from malleable.lightning_modules.functional.language.selected_logps import selected_token_logps

B, T, V, N = 3, 5, 11, 7


@pytest.fixture(params=[1, 3 * V, 1 << 19], ids=["a row at a time", "three rows at a time", "all at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(selected_logps, "CHUNK", request.param)


def inputs(dtype=torch.float32):
    logits = (4 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    targets, positions = torch.randint(V, (B, N)), torch.randint(T, (B, N))
    targets[:, 1], positions[:, 1] = targets[:, 0], positions[:, 0]  # chosen twice
    return logits, targets, positions


def by_log_softmax(logits, targets, positions):
    rows = torch.arange(B)[:, None]
    return logits.log_softmax(-1, dtype=torch.float32)[rows, positions, targets]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("chunk")
def test_equals_log_softmax(dtype):
    logits, targets, positions = inputs(dtype)
    weights = torch.randn(B, N)
    found = []
    for function in (selected_token_logps, by_log_softmax):
        logps = function(logits, targets, positions)
        assert logps.dtype == torch.float32
        (grad,) = torch.autograd.grad((logps * weights).sum(), logits)
        assert grad.dtype == dtype
        found.append((logps, grad))
    (ours, our_grad), (theirs, their_grad) = found
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.usefixtures("chunk")
def test_gradient_in_double_precision():
    logits, targets, positions = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda logits: selected_token_logps(logits, targets, positions), (logits,))


def test_second_derivatives():
    logits, targets, positions = inputs(torch.float64)
    assert torch.autograd.gradgradcheck(lambda logits: selected_token_logps(logits, targets, positions), (logits,))


def test_a_token_for_each_position_by_default():
    logits = torch.randn(B, T, V)
    targets = torch.randint(V, (B, T))
    expected = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(selected_token_logps(logits, targets), expected)


def test_no_selected_tokens():
    logits = torch.randn(B, T, V, requires_grad=True)
    logps = selected_token_logps(logits, torch.zeros(B, 0, dtype=torch.long), torch.zeros(B, 0, dtype=torch.long))
    assert logps.shape == (B, 0)
    logps.sum().backward()
    assert not logits.grad.any()


def test_saved_tensors_are_the_logits_and_one_number_for_each_position():
    stored = []
    logits, targets, positions = inputs(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tensor) or tensor, lambda tensor: tensor):
        ours = selected_token_logps(logits, targets, positions)
        large = [tensor for tensor in stored if tensor.numel() >= logits.numel()]
        assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]
        assert sum(tensor.numel() for tensor in stored) == B * T * V + B * T + 2 * B * N
        stored.clear()
        by_log_softmax(logits, targets, positions)
    assert any(tensor.dtype == torch.float32 and tensor.numel() == logits.numel() for tensor in stored), "log_softmax keeps a float32 copy"
    assert ours.requires_grad
