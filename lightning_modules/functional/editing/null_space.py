"""Updates of a weight matrix that preserve its output for ordinary text: second moments, null spaces, closed-form solutions.

A matrix ``W`` maps keys to values, ``v = W k``. Keys are stored as rows, like activations, so an update is applied as ``keys @ update.T``.

Shapes: N keys of text, d width of a key, v width of a value, u facts of a batch, n keys of earlier batches, m retained directions.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ROWS = 1 << 13  # number of keys that are multiplied in single precision before the sum in double precision

ThresholdMode = Literal["absolute", "relative_to_max", "relative_energy", "rank"]


class SecondMoment:
    """Uncentred second moment of keys, ``mean k k^T``, accumulated in double precision.

    The keys of first tokens are hundreds of times longer than others. In single precision, their rounding errors would exceed the small eigenvalues
    of the sum.

    Args:
        width: d.
        device: Device of the sum.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(width, width, dtype=torch.double, device=device)
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add keys, ``(N, d)``."""
        for part in torch.split(keys, ROWS):
            part = part if part.dtype == torch.double else part.float()
            self.total += (part.T @ part).double()
        self.count += len(keys)

    def merge(self, other: SecondMoment) -> None:
        """Add the keys of another second moment."""
        self.total += other.total.to(self.total.device)
        self.count += other.count

    def mean(self) -> Tensor:
        """Return the mean, ``(d, d)``.

        Raises:
            ValueError: If there are no keys, or if a key is not finite.
        """
        if not self.count:
            raise ValueError("the second moment has no keys; add keys of at least one text")
        if not bool(self.total.diagonal().isfinite().all()):
            raise ValueError("the second moment has keys that are not finite: the model overflows in this precision; load it in float32")
        return (self.total + self.total.T) / (2 * self.count)


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a second moment.

    Attributes:
        values: ``(d,)``, in ascending order, >= 0.
        vectors: ``(d, d)``, as columns.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Decompose a symmetric matrix ``(d, d)``."""
        values, vectors = torch.linalg.eigh(moment)
        # Rounding can make zero eigenvalues negative.
        return cls(values.clamp_min(0), vectors)


@dataclass
class Threshold:
    """Selection of the directions of a second moment that an edit may change.

    Attributes:
        mode: ``absolute`` retains eigenvalues below ``value``; ``relative_to_max`` eigenvalues below ``value`` times the largest one;
            ``relative_energy`` the smallest eigenvalues whose sum is at most the share ``value`` of the sum of all; ``rank`` the ``value`` smallest
            eigenvalues.
        value: See ``mode``. Absolute values refer to moments that are means over tokens.

    Raises:
        ValueError: If ``mode`` is unknown or ``value`` is out of range.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, section 3.2 (1e-2; 2e-2 in the authors' code).
        Differs: modes other than ``absolute`` are added.
    """

    mode: ThresholdMode = "absolute"
    value: float = 2e-2

    def __post_init__(self) -> None:
        """Check the values."""
        if self.mode not in get_args(ThresholdMode):
            raise ValueError(f"threshold.mode must be one of {', '.join(get_args(ThresholdMode))}, got {self.mode!r}")
        if self.value <= 0:
            raise ValueError(f"threshold.value must be > 0, got {self.value}")
        if self.mode == "relative_energy" and self.value > 1:
            raise ValueError(f"threshold.value is a share of the energy under relative_energy, at most 1, got {self.value}")
        if self.mode == "rank" and self.value != int(self.value):
            raise ValueError(f"threshold.value is a number of directions under rank, got {self.value}")

    def retained(self, values: Tensor) -> int:
        """Return the number of retained directions, m.

        Args:
            values: ``(d,)`` eigenvalues in ascending order.

        Raises:
            ValueError: If no direction is retained.
        """
        if self.mode == "absolute":
            retained = values < self.value
        elif self.mode == "relative_to_max":
            retained = values < self.value * values[-1]
        elif self.mode == "relative_energy":
            retained = values.cumsum(0) <= self.value * values.sum()
        else:
            retained = torch.arange(len(values)) < self.value
        number = int(retained.sum())
        if not number:
            raise ValueError(
                f"threshold {self.mode} {self.value:g} retains none of {len(values)} directions (their moments are between {values[0]:.3g} and "
                f"{values[-1]:.3g}): no edit is possible; increase threshold.value, or use another mode"
            )
        if number == len(values):
            log.warning("threshold %s %g retains all %s directions: edits are not restricted", self.mode, self.value, number)
        return number


class NullSpace:
    """Projector ``P`` onto the retained directions, stored as a basis of these or of their complement, whichever is smaller.

    Args:
        spectrum: Spectrum of the second moment of keys.
        retained: m.
    """

    def __init__(self, spectrum: Spectrum, retained: int) -> None:
        width = len(spectrum.values)
        self.retained = retained
        self.complement = 2 * retained > width
        self.basis = (spectrum.vectors[:, retained:] if self.complement else spectrum.vectors[:, :retained]).contiguous()

    def project(self, keys: Tensor) -> Tensor:
        """Project keys ``(N, d)``; return ``(N, d)``."""
        basis = self.basis.to(keys.dtype)
        inside = keys @ basis @ basis.T
        return keys - inside if self.complement else inside

    def dense(self) -> Tensor:
        """Return the projector as a matrix, ``(d, d)``."""
        return self.project(torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device))


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
        """Return ``k / ridge``."""
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
        """Return ``k P / ridge``."""
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
        """Return ``k U diag(1 / costs) U^T``."""
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
