"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math


def warmup_decay(step: int, total: float, warmup: int = 0, decay: str = "linear") -> float:
    """Return the learning rate as a fraction of the peak rate: a linear warm-up, then decay to zero.

    Args:
        step: Number of completed optimizer steps.
        total: Total number of steps; ``math.inf`` keeps the peak rate after the warm-up.
        warmup: Number of warm-up steps, at most ``total``.
        decay: ``linear``, ``cosine`` or ``constant``.

    Raises:
        ValueError: If ``decay`` is unknown.
    """
    if decay not in ("linear", "cosine", "constant"):
        raise ValueError(f"decay must be linear, cosine or constant, got '{decay}'")
    rise = min(warmup, total)
    if step < rise:
        return (step + 1) / rise
    rest = min(1.0, (step - rise) / max(1, total - rise))
    if decay == "constant":
        return 1.0
    return 1.0 - rest if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
