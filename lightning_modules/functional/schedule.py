"""Learning-rate courses as pure functions of the step."""

from __future__ import annotations

import math


def warmup_decay(step: int, total: float, warmup: int = 0, decay: str = "linear") -> float:
    """Factor of the peak rate: a linear rise, then decay to zero.

    Args:
        step: Optimizer steps made so far.
        total: Steps of the whole course; ``math.inf`` holds the peak rate.
        warmup: Steps of the rise; cut to the whole course.
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
