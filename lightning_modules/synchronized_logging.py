"""Logging of values that are the same on all ranks."""

from __future__ import annotations

import re
import warnings
from typing import Any

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
