"""Selection of newly logged metrics. ``trainer.callback_metrics`` also contains earlier values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def newly_logged(metrics: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics that were logged after a copy was made, including metrics whose values are the same.

    Newly logged values are new tensors, so they are detected by their memory addresses.

    Args:
        metrics: Current ``trainer.callback_metrics``.
        earlier: Earlier copy of the mapping, or of a part of it. It keeps references to the old tensors, so that new tensors have other addresses.
    """
    return {name: value for name, value in metrics.items() if name not in earlier or value.data_ptr() != earlier[name].data_ptr()}
