"""Context managers for the default device and dtype of new tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Set the default dtype to float32 if it is a half precision; a context manager and decorator.

    Precision plugins such as ``bf16-true`` set the default dtype while weights, steps and metrics run. Masks, sums and metric states would then be
    rounded to half precision, too. Wider defaults, such as float64 under ``64-true``, are not changed.
    """
    default = torch.get_default_dtype()
    if default not in HALF:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def drawn_on_cpu() -> Iterator[None]:
    """Draw initial weights from the CPU generator, in float32 or wider, so that a seed gives the same model on every device.

    Strategies set their device as the default while they configure a module. Move the weights to ``torch.get_default_device()`` after this
    context, or leave that to the strategy.
    """
    with torch.device("cpu"), float32_by_default():
        yield
