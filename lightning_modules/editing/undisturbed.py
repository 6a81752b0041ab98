"""A model that is edited or asked, and afterwards is in the state it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients to parameters and full precision of products, put back afterwards; works under inference mode."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()
    for parameter in flags:
        parameter.requires_grad_(False)
    device = next(model.parameters()).device.type
    try:
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
