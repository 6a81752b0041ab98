"""Metrics logged since the last check. `trainer.callback_metrics` also holds earlier values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logged_anew(metrics: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics that were logged since an earlier copy was taken, also those whose values did not change.

    Args:
        metrics: ``trainer.callback_metrics`` now.
        earlier: A copy of the same mapping, or of a part of it. It keeps the tensors alive, so that new values have other addresses.
    """
    return {name: value for name, value in metrics.items() if name not in earlier or value.data_ptr() != earlier[name].data_ptr()}
