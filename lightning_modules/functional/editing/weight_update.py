"""Closed-form update of a weight matrix, and the penalties that limit it.

A matrix ``W`` maps keys to values, ``v = W k``. Keys are stored as rows, like activations, so an update is applied as ``keys @ update.T``.

Shapes: N keys, d width of a key, v width of a value, u facts of a batch, n keys of earlier batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.functional.editing.null_space import NullSpace
from malleable.lightning_modules.functional.editing.second_moments import Spectrum


class KeyMetric(ABC):
    """Penalty ``tr(D M D^T)`` of an update ``D``; :meth:`solve` applies the inverse of ``M``."""

    @abstractmethod
    def solve(self, keys: Tensor) -> Tensor:
        """Return ``k M^-1`` for keys ``(N, d)``; 0 along directions that may not change."""


class Ridge(KeyMetric):
    """Equal penalty for all directions, ``M = ridge I``.

    Args:
        ridge: lambda, > 0.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = _positive("ridge", ridge)

    def solve(self, keys: Tensor) -> Tensor:
        """Return ``k / ridge``, ``(N, d)``."""
        return keys / self.ridge


class NullSpaceRidge(Ridge):
    """Equal penalty for all directions of a null space, and no changes outside it.

    Args:
        null_space: Directions that may change.
        ridge: lambda, > 0.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, Eq. 14 with the ridge of the authors' code (10 instead of 1).
    """

    def __init__(self, null_space: NullSpace, ridge: float) -> None:
        super().__init__(ridge)
        self.null_space = null_space

    def solve(self, keys: Tensor) -> Tensor:
        """Return ``k P / ridge``, ``(N, d)``."""
        return self.null_space.project(keys) / self.ridge


class Covariance(KeyMetric):
    """Penalty proportional to the second moment of keys, ``M = weight C``.

    Args:
        spectrum: Spectrum of the second moment C.
        weight: Factor, > 0.
        floor: Lower bound of the eigenvalues, relative to the largest one; without it, unused directions would have no penalty.

    Source:
        Meng et al. (2023), Mass-Editing Memory in a Transformer, arXiv:2210.07229, Eq. 14.
    """

    def __init__(self, spectrum: Spectrum, weight: float, floor: float = 1e-6) -> None:
        self.vectors = spectrum.vectors
        self.costs = _positive("weight", weight) * spectrum.values.clamp_min(floor * spectrum.values[-1])

    def solve(self, keys: Tensor) -> Tensor:
        """Return ``k U diag(1 / costs) U^T``, ``(N, d)``."""
        vectors = self.vectors.to(keys.dtype)
        return keys @ vectors / self.costs.to(keys.dtype) @ vectors.T


class LowRank(NamedTuple):
    """Low-rank matrix ``up @ down``.

    Attributes:
        up: ``(v, u)``.
        down: ``(u, d)``.
    """

    up: Tensor
    down: Tensor

    def dense(self) -> Tensor:
        """Return the matrix, ``(v, d)``."""
        return self.up @ self.down


def solve_update(keys: Tensor, residuals: Tensor, metric: KeyMetric, past: Tensor | None = None) -> LowRank:
    """Compute the update ``D`` that minimises ``|D K - R|^2 + |D K_p|^2 + tr(D M D^T)``.

    The dual system has a row for each key instead of one for each column of the matrix:
    ``D = [R, 0] (K' M^-1 K + I)^-1 K' M^-1``, where ``K`` contains new and past keys. It is solved in double precision.

    Args:
        keys: ``(u, d)`` keys of the facts.
        residuals: ``(u, v)`` differences between the target values and the present values of the keys.
        metric: Penalty of the update.
        past: ``(n, d)`` keys of earlier edits, whose values are preserved.

    Returns:
        The update, in double precision.

    Raises:
        ValueError: If keys or residuals are not finite.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, Eq. 14.
        Differs: solved in the dual form, which has the same solution.
    """
    if not (bool(keys.isfinite().all()) and bool(residuals.isfinite().all())):
        raise ValueError(
            "keys or residuals of the edit are not finite: the model overflows in this precision (load it in float32), or the optimisation of a "
            "target diverged"
        )
    new = keys.double()
    every = new if past is None or not len(past) else torch.cat([new, past.double()])
    mapped = metric.solve(every)
    gram = every @ mapped.T
    system = (gram + gram.T) / 2 + torch.eye(len(every), dtype=gram.dtype, device=gram.device)
    chosen = torch.eye(len(every), len(new), dtype=gram.dtype, device=gram.device)
    coefficients = torch.cholesky_solve(chosen, torch.linalg.cholesky(system))
    return LowRank(residuals.double().T.contiguous(), coefficients.T @ mapped)


def compress_keys(keys: Tensor) -> Tensor:
    """Return at most d rows with the same ``K^T K`` as keys ``(n, d)``; :func:`solve_update` depends on past keys only through this product."""
    return keys if len(keys) <= keys.shape[1] else torch.linalg.qr(keys.double(), mode="r").R


def mean_drift(update: LowRank, moment: Tensor) -> float:
    """Compute the mean of ``|D k|^2`` over the keys of a second moment ``C``, ``tr(D C D^T)``.

    If ``D = D P``, it is at most the absolute threshold times ``|D|^2``.

    Args:
        update: D.
        moment: ``(d, d)``.
    """
    up, down = (part.to(moment.device).double() for part in update)
    return float((up.T @ up * (down @ moment.double() @ down.T)).sum())


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value
