"""The counter finds what waits for a device, and nothing else."""

import pytest
import torch
from synchronisations import Synchronisations

WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "range": lambda x: torch.arange(x.max()),
    "boolean index": lambda x: x[x > 1],
    "boolean assignment of several values": lambda x: x.__setitem__(x > 1, x[:1].expand(2)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "formatted": lambda x: f"{x.sum().item():.3f}",
}
FREE = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "masked fill": lambda x: x.masked_fill(x > 1, 0),
    "boolean assignment of one value": lambda x: x.__setitem__(x > 1, 0),
    "integer index": lambda x: x[x.clamp(0, 1)],
    "asynchronous copy": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "asynchronous assertion": lambda x: torch._assert_async((x >= 0).all()),
    "other type": lambda x: x.float(),
}


@pytest.mark.parametrize("name", WAITING)
def test_found(name):
    with Synchronisations() as waits:
        WAITING[name](torch.arange(4, device="meta"))
    assert waits.found
    assert all("test_synchronisations.py" in place for place in waits.found), waits


@pytest.mark.parametrize("name", FREE)
def test_not_found(name):
    with Synchronisations() as waits:
        FREE[name](torch.arange(4, device="meta"))
    assert not waits.found, waits


def test_what_is_read_from_another_device_does_not_count():
    with Synchronisations("meta") as waits:
        torch.ones(()).item()
        torch.arange(3)[torch.tensor([True, False, True])]
    assert not waits.found, waits
    with Synchronisations("meta") as waits:
        torch.ones((), device="meta").item()
        torch.ones(3).to("meta")
    assert len(waits.found) == 2, waits


def test_backward_passes_are_covered():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(3, device="meta", requires_grad=True)
    with Synchronisations() as waits:
        Reading.apply(x).sum().backward()
    assert len(waits.found) == 1
