"""Is a difference between two runs more than chance? Resampling over rows, for any per-row metric; without torch, so that it starts quickly.

Shapes: R rows; both runs must list the same rows in the same order.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK = 1 << 22  # drawn numbers held at a time
_METRIC = re.compile(r"((?:hr|hits|ndcg)(?=_)|mrr|mr$)(?:_(\d+))?")


class Interval(NamedTuple):
    """A mean and the limits of its confidence interval."""

    mean: float
    low: float
    high: float


def row_values(metric: str, ranks: Any) -> Floats | None:
    """Return the value of a ranking metric for each row, whose mean is the metric.

    Args:
        metric: Such as ``hr_10``, ``ndcg_10``, ``mrr``, ``hits_3`` or ``mr``.
        ranks: ``(R,)`` rank of the true answer, from 1; ``inf`` where it is not in the list.

    Returns:
        ``(R,)``; ``None`` for a metric that is no mean over ranks.
    """
    match = _METRIC.fullmatch(metric)
    if match is None:
        return None
    ranks = np.asarray(ranks, dtype=np.float64)
    reached = ranks <= (float(match[2]) if match[2] else np.inf)
    values = {"mr": ranks, "mrr": 1 / ranks, "ndcg": 1 / np.log2(ranks + 1)}.get(match[1], np.ones_like(ranks))
    return np.where(reached, values, 0.0)


def bootstrap_interval(values: Any, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over rows.

    Args:
        values: ``(R,)`` per-row metric, an array or a tensor; for a paired interval, the difference of two runs.
        level: Share of resamples within the limits, in (0, 1).
        samples: Number of resamples.
        seed: Seed of the draws.

    Source:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    rows = _rows(values)
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(rows))
    sizes = [min(step, samples - start) for start in range(0, samples, step)]
    means = [rows[generator.integers(len(rows), size=(size, len(rows)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(float(rows.mean()), low, high)


def paired_bootstrap(first: Any, second: Any, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap the mean of ``second - first`` over rows, each ``(R,)``."""
    return bootstrap_interval(_difference(first, second), level, samples, seed)


def randomization_test(first: Any, second: Any, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of equal means: how often exchanging the two runs at random, row by row, gives as large a difference.

    Args:
        first: ``(R,)`` per-row metric of one run.
        second: The same rows of another run.
        samples: Number of random exchanges.
        seed: Seed of the draws.

    Source:
        Smucker, Allan and Carterette (2007), A comparison of statistical significance tests for information retrieval evaluation, section 2.1.
        Differs: the observed labelling counts as one of the samples, so p is never 0.
    """
    difference = _difference(first, second)
    generator = np.random.default_rng(seed)
    observed = abs(difference.sum()) * (1 - 1e-12)  # an equal sum in another order must count
    step = max(1, CHUNK // len(difference))
    extreme = 0
    for start in range(0, samples, step):
        signs = generator.integers(2, size=(min(step, samples - start), len(difference))) * 2.0 - 1
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return (extreme + 1) / (samples + 1)


def _difference(first: Any, second: Any) -> Floats:
    if first.shape != second.shape:
        raise ValueError(f"both runs need the same rows, got shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return _rows(second) - _rows(first)


def _rows(values: Any) -> Floats:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number a row, (R,) with R >= 1, got shape {tuple(values.shape)}")
    # A tensor may need a gradient or lie on another device.
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
