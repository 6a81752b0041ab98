"""Which figures were logged anew: the Trainer keeps the last value of everything that was ever logged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logged_anew(metrics: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the figures that were logged since an earlier look at them, whether or not their values changed.

    Args:
        metrics: ``trainer.callback_metrics`` now.
        earlier: The same mapping, or a part of it, as it was. As long as a figure is held there, a new one has other memory.
    """
    return {name: value for name, value in metrics.items() if name not in earlier or value.data_ptr() != earlier[name].data_ptr()}
