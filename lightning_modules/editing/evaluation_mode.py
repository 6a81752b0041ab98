"""Context that puts a model into evaluation mode and restores its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, disable gradients of parameters, and use full precision for matrix products; restore all of these at the end.

    The context disables autocast and inference mode, so it can also be used inside them.
    """
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
