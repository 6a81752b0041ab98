"""Updates of a matrix that leave what it makes of ordinary keys alone: second moments, null spaces, closed-form solutions.

A matrix ``W`` maps keys to values, ``v = W k``. Keys are rows here, as activations are, so an update acts as ``keys @ update.T``.

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

ROWS = 1 << 13  # keys multiplied in single precision before they are added up in double

ThresholdMode = Literal["absolute", "relative_to_max", "relative_energy", "rank"]


class SecondMoment:
    """Uncentred second moment of keys, ``mean k k^T``, in one pass and in double precision.

    A few keys of text (the first token's) are hundreds of times longer than the rest, and would swamp the small eigenvalues of a sum in single
    precision.

    Args:
        width: d.
        device: Where the sum lies.
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
        """Add what another has seen."""
        self.total += other.total.to(self.total.device)
        self.count += other.count

    def mean(self) -> Tensor:
        """The moment, ``(d, d)``.

        Raises:
            ValueError: If there are no keys, or some were not finite.
        """
        if not self.count:
            raise ValueError("the second moment has no keys: give it text")
        if not bool(self.total.diagonal().isfinite().all()):
            raise ValueError("the second moment has keys that are not finite: the model overflows in this precision; load it in float32")
        return (self.total + self.total.T) / (2 * self.count)


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a second moment.

    Attributes:
        values: ``(d,)``, from the least, none below 0.
        vectors: ``(d, d)``, a column each.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Decompose a symmetric ``(d, d)``."""
        values, vectors = torch.linalg.eigh(moment)
        # Rounding makes some of what should be zeros negative.
        return cls(values.clamp_min(0), vectors)


@dataclass
class Threshold:
    """Which directions of a second moment count as unused.

    Attributes:
        mode: ``absolute`` keeps eigenvalues below ``value``; ``relative_to_max`` those below ``value`` times the largest one;
            ``relative_energy`` the smallest ones as long as their sum stays within ``value`` of all; ``rank`` the ``value`` smallest.
        value: See ``mode``. Absolute values hold for moments that are means over tokens.

    Raises:
        ValueError: If ``value`` is out of its range.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, section 3.2 (1e-2; the authors' code has 2e-2); the other modes are ours.
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
        """Number of directions to keep, m, of eigenvalues ``(d,)`` in rising order.

        Raises:
            ValueError: If none is left, so that nothing could be changed.
        """
        if self.mode == "absolute":
            kept = values < self.value
        elif self.mode == "relative_to_max":
            kept = values < self.value * values[-1]
        elif self.mode == "relative_energy":
            kept = values.cumsum(0) <= self.value * values.sum()
        else:
            kept = torch.arange(len(values)) < self.value
        number = int(kept.sum())
        if not number:
            raise ValueError(
                f"threshold {self.mode} {self.value:g} keeps none of {len(values)} directions (their moments lie between {values[0]:.3g} and "
                f"{values[-1]:.3g}): no edit is possible; raise it, or use another mode"
            )
        if number == len(values):
            log.warning("threshold %s %g keeps all %s directions: nothing is protected", self.mode, self.value, number)
        return number


class NullSpace:
    """Projector on the directions that text hardly uses, ``P``, kept as a basis of it or of the rest, whichever is thinner.

    Args:
        spectrum: Of the second moment of keys.
        retained: m.
    """

    def __init__(self, spectrum: Spectrum, retained: int) -> None:
        width = len(spectrum.values)
        self.retained = retained
        self.complement = 2 * retained > width
        self.basis = (spectrum.vectors[:, retained:] if self.complement else spectrum.vectors[:, :retained]).contiguous()

    def project(self, keys: Tensor) -> Tensor:
        """Project keys, ``(N, d)``."""
        basis = self.basis.to(keys.dtype)
        inside = keys @ basis @ basis.T
        return keys - inside if self.complement else inside

    def dense(self) -> Tensor:
        """The projector, ``(d, d)``."""
        return self.project(torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device))


class KeyMetric(ABC):
    """What a change costs: ``tr(D M D^T)`` for an update ``D``; :meth:`solve` applies the inverse of ``M``."""

    @abstractmethod
    def solve(self, keys: Tensor) -> Tensor:
        """``k M^-1`` of keys ``(N, d)``; 0 along directions in which nothing may change."""


class Ridge(KeyMetric):
    """Every direction costs alike, ``M = ridge I``.

    Args:
        ridge: lambda, > 0.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = _positive("ridge", ridge)

    def solve(self, keys: Tensor) -> Tensor:
        """``k / ridge``."""
        return keys / self.ridge


class NullSpaceRidge(Ridge):
    """Alike within a null space, infinitely much outside of it.

    Args:
        null_space: Where changes may lie.
        ridge: lambda, > 0.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, Eq. 14 with the ridge of the authors' code (10 instead of 1).
    """

    def __init__(self, null_space: NullSpace, ridge: float) -> None:
        super().__init__(ridge)
        self.null_space = null_space

    def solve(self, keys: Tensor) -> Tensor:
        """``k P / ridge``."""
        return self.null_space.project(keys) / self.ridge


class Covariance(KeyMetric):
    """As much as text uses a direction, ``M = weight C``.

    Args:
        spectrum: Of the second moment C.
        weight: > 0.
        floor: Least eigenvalue, as a share of the largest: directions that no text used would cost nothing.

    Source:
        Meng et al. (2023), Mass-Editing Memory in a Transformer, arXiv:2210.07229, Eq. 14.
    """

    def __init__(self, spectrum: Spectrum, weight: float, floor: float = 1e-6) -> None:
        self.vectors = spectrum.vectors
        self.costs = _positive("weight", weight) * spectrum.values.clamp_min(floor * spectrum.values[-1])

    def solve(self, keys: Tensor) -> Tensor:
        """``k U diag(1 / costs) U^T``."""
        vectors = self.vectors.to(keys.dtype)
        return keys @ vectors / self.costs.to(keys.dtype) @ vectors.T


class LowRank(NamedTuple):
    """A matrix ``up @ down``.

    Attributes:
        up: ``(v, u)``.
        down: ``(u, d)``.
    """

    up: Tensor
    down: Tensor

    def dense(self) -> Tensor:
        """The matrix, ``(v, d)``."""
        return self.up @ self.down


def solve_update(keys: Tensor, residuals: Tensor, metric: KeyMetric, past: Tensor | None = None) -> LowRank:
    """Find the cheapest update that makes of keys what is missing: minimise ``|D K - R|^2 + |D K_p|^2 + tr(D M D^T)``.

    The system has a row for each key ever edited instead of one for each column of the matrix:
    ``D = [R, 0] (K' M^-1 K + I)^-1 K' M^-1`` with ``K`` the new keys and the past ones. It is solved in double precision.

    Args:
        keys: ``(u, d)`` keys of the facts.
        residuals: ``(u, v)`` what their values lack.
        metric: What a change costs.
        past: ``(n, d)`` keys of earlier edits, whose values are to stay.

    Returns:
        The update, double precision.

    Raises:
        ValueError: If keys or residuals are not finite.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, Eq. 14.
        Differs: the dual form, which is equal.
    """
    if not (bool(keys.isfinite().all()) and bool(residuals.isfinite().all())):
        raise ValueError("keys or residuals of the edit are not finite: the model overflows, or a target was lost")
    new = keys.double()
    every = new if past is None or not len(past) else torch.cat([new, past.double()])
    mapped = metric.solve(every)
    gram = every @ mapped.T
    system = (gram + gram.T) / 2 + torch.eye(len(every), dtype=gram.dtype, device=gram.device)
    chosen = torch.eye(len(every), len(new), dtype=gram.dtype, device=gram.device)
    coefficients = torch.cholesky_solve(chosen, torch.linalg.cholesky(system))
    return LowRank(residuals.double().T.contiguous(), coefficients.T @ mapped)


def compress_keys(keys: Tensor) -> Tensor:
    """Find at most d rows with the same ``K^T K`` as ``(n, d)``: all that :func:`solve_update` takes of the past."""
    return keys if len(keys) <= keys.shape[1] else torch.linalg.qr(keys.double(), mode="r").R


def mean_drift(update: LowRank, moment: Tensor) -> float:
    """Mean of ``|D k|^2`` over the text that the moment ``(d, d)`` is of, ``tr(D C D^T)``; for ``D = D P`` at most threshold times ``|D|^2``."""
    up, down = (part.to(moment.device).double() for part in update)
    return float((up.T @ up * (down @ moment.double() @ down.T)).sum())


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value
