"""The change of one tensor: whole, or as the product of two thin matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """What a patch adds to one tensor, kept on the CPU in float32 (float64 where it is given so).

    Attributes:
        up: The delta itself, of the tensor's shape; with ``down``, its left factor ``(d1, r)``.
        down: The right factor ``(r, d0)`` of a low-rank delta ``up @ down``, as the tensor is stored: a ``Conv1D`` of GPT-2
            stores inputs by outputs.

    Raises:
        ValueError: If a value is not finite or not real, or the factors do not fit each other.
    """

    up: Tensor
    down: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "up", _settled(self.up))
        if self.down is None:
            return
        object.__setattr__(self, "down", _settled(self.down))
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0] or not self.down.shape[0]:
            raise ValueError(f"a low-rank delta is (d1, r) @ (r, d0) with r >= 1, got {tuple(self.up.shape)} and {tuple(self.down.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor it is added to."""
        return tuple(self.up.shape) if self.down is None else (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int | None:
        """Inner size of the two factors, ``None`` for a dense delta."""
        return None if self.down is None else self.down.shape[0]

    def dense(self) -> Tensor:
        """Return the whole delta in float32 (float64 if a factor is).

        The product runs in float64 and is rounded once, so that the number of threads practically never shows in it.
        """
        if self.down is None:
            return self.up
        wide = torch.promote_types(self.up.dtype, self.down.dtype)
        return (self.up.double() @ self.down.double()).to(wide)

    def dot(self, other: Delta) -> float:
        """Return the Frobenius inner product; factored deltas are never multiplied out."""
        factored, second = (self, other) if self.down is not None else (other, self)
        if factored.down is None:
            return float((factored.up.double() * second.up.double()).sum())
        projected = factored.up.double().T @ second.up.double()
        if second.down is not None:
            projected = projected @ second.down.double()
        return float((projected * factored.down.double()).sum())

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(max(self.dot(self), 0.0))

    def cosine(self, other: Delta) -> float:
        """Return the cosine of the angle to another delta of the same shape, 0 if one of them is zero."""
        norms = self.norm * other.norm
        return self.dot(other) / norms if norms else 0.0

    def share_in_rows_of(self, other: Delta) -> float | None:
        """Return the share, 0 to 1, of this delta's squared norm that lies in the row space of a low-rank one; ``None`` for a dense one."""
        if other.down is None:
            return None
        basis = _row_basis(other.up.double(), other.down.double())
        projected = self.up.double() @ basis if self.down is None else self.up.double() @ (self.down.double() @ basis)
        energy = self.dot(self)
        return float(projected.square().sum()) / energy if energy else 0.0


def _row_basis(up: Tensor, down: Tensor) -> Tensor:
    """Orthonormal basis ``(d0, k)`` of the rows of ``up @ down``; directions within the rounding of float32 factors are none."""
    right, right_core = torch.linalg.qr(down.T)
    core = torch.linalg.qr(up, mode="r").R @ right_core.T
    _, values, rows = torch.linalg.svd(core, full_matrices=False)
    kept = values > values[0] * max(up.shape[0], down.shape[1]) * torch.finfo(torch.float32).eps
    basis: Tensor = right @ rows[kept].T
    return basis


def _settled(tensor: Tensor) -> Tensor:
    """A copy that nobody else changes."""
    if not tensor.is_floating_point():
        raise ValueError(f"a delta is of real numbers, got {tensor.dtype}")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    settled = tensor.detach().to("cpu", wide, copy=True).contiguous()
    if not settled.isfinite().all():
        raise ValueError("a delta must be finite, got infinite or undefined values")
    return settled
