"""Is a difference between two runs more than chance? Resampling over rows, for any per-row metric.

Shapes: R rows; both runs must list the same rows in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22  # drawn numbers held at a time


class Interval(NamedTuple):
    """A mean and the limits of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Tensor, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over rows.

    Args:
        values: ``(R,)`` per-row metric; for a paired interval, the difference of two runs.
        level: Share of resamples within the limits, in (0, 1).
        samples: Number of resamples.
        seed: Seed of the draws.

    Source:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    values = _rows(values)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, CHUNK // len(values))
    means = []
    for start in range(0, samples, step):
        drawn = torch.randint(len(values), (min(step, samples - start), len(values)), generator=generator)
        means.append(values[drawn].mean(1))
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
    low, high = torch.cat(means).quantile(edges).tolist()
    return Interval(values.mean().item(), low, high)


def paired_bootstrap(first: Tensor, second: Tensor, level: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap the mean of ``second - first`` over rows, each ``(R,)``."""
    return bootstrap_interval(_difference(first, second), level, samples, seed)


def randomization_test(first: Tensor, second: Tensor, samples: int = 10_000, seed: int = 0) -> float:
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
    generator = torch.Generator().manual_seed(seed)
    observed = difference.sum().abs() * (1 - 1e-12)  # an equal sum in another order must count
    step = max(1, CHUNK // len(difference))
    extreme = 0
    for start in range(0, samples, step):
        signs = torch.randint(2, (min(step, samples - start), len(difference)), generator=generator).double() * 2 - 1
        extreme += int(((signs @ difference).abs() >= observed).sum())
    return (extreme + 1) / (samples + 1)


def _difference(first: Tensor, second: Tensor) -> Tensor:
    if first.shape != second.shape:
        raise ValueError(f"both runs need the same rows, got shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return _rows(second).sub(_rows(first))


def _rows(values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number a row, (R,) with R >= 1, got shape {tuple(values.shape)}")
    return values.detach().cpu().double()
