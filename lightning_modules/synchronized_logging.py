"""Logging of values that are the same on all ranks, and reduction of values over batches and ranks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def log_synchronized(module: LightningModule, name: str, value: Tensor | float, **options: Any) -> None:
    """Log a value that is the same on all ranks, and hide Lightning's recommendation to log this name with ``sync_dist=True``.

    Lightning cannot know that the value needs no further reduction. The recommendation is still shown for other names, e.g. those of a user's module.

    Args:
        module: Module that logs.
        name: Name of the value.
        value: The value, a scalar.
        options: Further arguments of ``LightningModule.log``.
    """
    pattern = rf"It is recommended to use `self\.log\({re.escape(repr(name))}"
    # A new filter makes Python show other warnings again.
    if not any(getattr(entry[1], "pattern", None) == pattern for entry in warnings.filters):
        warnings.filterwarnings("ignore", pattern)
    module.log(name, value, rank_zero_only=False, **options)


def reduce_figures(batches: Sequence[Mapping[str, Tensor]], reduce: Callable[..., Any]) -> dict[str, Tensor]:
    """Reduce scalars over the batches of an optimizer step and over the ranks.

    Args:
        batches: Scalars of each batch, by name; the names are the same for all batches and ranks.
        reduce: Function ``reduce(tensor, reduce_op=...)`` that reduces over the ranks.

    Returns:
        The mean of each value; the minimum or maximum if its name ends in ``_min`` or ``_max``.
    """
    extremes = [name for name in batches[0] if name.endswith(("_min", "_max"))]
    means = [name for name in batches[0] if name not in extremes]
    reduced: dict[str, Tensor] = {}
    if means:
        values = torch.stack([torch.stack([figures[name] for name in means]) for figures in batches]).mean(0)
        reduced |= zip(means, reduce(values, reduce_op="mean"), strict=True)
    if extremes:
        # The minimum is the negative maximum of negative values, so that one reduction is sufficient.
        values = torch.stack([torch.stack([_signed(name, figures[name]) for name in extremes]) for figures in batches]).amax(0)
        largest = reduce(values, reduce_op="max")
        reduced |= {name: _signed(name, value) for name, value in zip(extremes, largest, strict=True)}
    return {name: reduced[name] for name in batches[0]}


def _signed(name: str, value: Tensor) -> Tensor:
    return -value if name.endswith("_min") else value
