"""Significance of differences between two runs, by resampling of rows. Does not import torch, so that it starts quickly.

Shapes: R rows; both runs must have the same rows in the same order.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK = 1 << 22  # maximum number of random numbers in memory
_METRIC = re.compile(r"((?:hr|hits|ndcg)(?=_)|mrr|mr$)(?:_(\d+))?")


class Interval(NamedTuple):
    """A mean and the limits of its confidence interval."""

    mean: float
    low: float
    high: float


def row_values(metric: str, ranks: Any) -> Floats | None:
    """Return the values of a ranking metric for each row; their mean is the metric.

    Args:
        metric: Name of the metric, e.g. ``hr_10``, ``ndcg_10``, ``mrr``, ``hits_3`` or ``mr``.
        ranks: ``(R,)`` rank of the true answer, from 1; ``inf`` if it is not in the list.

    Returns:
        ``(R,)``, or ``None`` for a metric that is not a mean over rows.
    """
    match = _METRIC.fullmatch(metric)
    if match is None:
        return None
    ranks = np.asarray(ranks, dtype=np.float64)
    reached = ranks <= (float(match[2]) if match[2] else np.inf)
    values = {"mr": ranks, "mrr": 1 / ranks, "ndcg": 1 / np.log2(ranks + 1)}.get(match[1], np.ones_like(ranks))
    return np.where(reached, values, 0.0)


def bootstrap_interval(values: Any, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Compute the percentile bootstrap interval of a mean over rows.

    Args:
        values: ``(R,)`` metric of each row, an array or tensor; for a paired interval, the difference of two runs.
        level: Confidence level, in (0, 1).
        samples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If ``level`` is out of range, or if ``values`` is empty or has more than one dimension.

    Source:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    _check_samples(samples)
    rows = _rows(values)
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(rows))
    sizes = [min(step, samples - start) for start in range(0, samples, step)]
    means = [rows[generator.integers(len(rows), size=(size, len(rows)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(float(rows.mean()), low, high)


def paired_bootstrap(first: Any, second: Any, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Compute the bootstrap interval of the mean of ``second - first``, ``(R,)`` each."""
    return bootstrap_interval(_difference(first, second), level, samples, seed)


def randomization_test(first: Any, second: Any, samples: int = 10_000, seed: int = 0) -> float:
    """Compute the two-sided p-value of a paired randomization test of equal means, which exchanges the two runs randomly in each row.

    Args:
        first: ``(R,)`` metric of each row in one run.
        second: ``(R,)`` metric of the same rows in another run.
        samples: Number of random exchanges.
        seed: Seed of the exchanges.

    Source:
        Smucker, Allan and Carterette (2007), A comparison of statistical significance tests for information retrieval evaluation, section 2.1.
        Differs: the observed assignment counts as one of the samples, so that p is never 0.
    """
    _check_samples(samples)
    difference = _difference(first, second)
    generator = np.random.default_rng(seed)
    observed = abs(difference.sum()) * (1 - 1e-12)  # tolerance, because equal sums can differ by rounding
    step = max(1, CHUNK // len(difference))
    extreme = 0
    for start in range(0, samples, step):
        signs = generator.integers(2, size=(min(step, samples - start), len(difference))) * 2.0 - 1
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return (extreme + 1) / (samples + 1)


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")


def _difference(first: Any, second: Any) -> Floats:
    if first.shape != second.shape:
        raise ValueError(
            f"both runs must have the same rows, got shapes {tuple(first.shape)} and {tuple(second.shape)}; compare runs on the same test data"
        )
    return _rows(second) - _rows(first)


def _rows(values: Any) -> Floats:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number for each row, (R,) with R >= 1, got shape {tuple(values.shape)}")
    # A tensor may require a gradient or be on another device.
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
