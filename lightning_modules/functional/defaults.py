"""Defaults under which tensors are created: where initial weights are drawn, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Context, or decorator, in which new floating-point tensors are float32 where a precision plugin has made a half precision the default.

    Plugins such as ``bf16-true`` set the default dtype around weights, steps and metrics. Masks, sums and metric states would then be rounded,
    although only weights and activations are meant. A wider default, such as that of ``64-true``, stays.
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
    """Context in which initial weights are drawn from the CPU's generator, in float32 at least, so that a seed gives one model on every device.

    Strategies make their device the default while a module is configured. Move what is built here afterwards, to
    ``torch.get_default_device()``, or leave that to the strategy.
    """
    with torch.device("cpu"), float32_by_default():
        yield
