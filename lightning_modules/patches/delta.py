"""Change of one tensor, dense or as a product of two low-rank factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """Change that a patch adds to one tensor, stored on the CPU in float32, or in float64 if given in float64.

    Attributes:
        up: Dense delta, of the tensor's shape; with ``down``, the left factor ``(d1, r)``.
        down: Right factor ``(r, d0)`` of a low-rank delta ``up @ down``, in the layout of the stored tensor: a ``Conv1D`` of GPT-2 is stored as
            inputs x outputs.

    Raises:
        ValueError: If a value is not finite or not real, or the shapes of the factors do not match.
    """

    up: Tensor
    down: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "up", _to_cpu(self.up))
        if self.down is None:
            return
        object.__setattr__(self, "down", _to_cpu(self.down))
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0] or not self.down.shape[0]:
            raise ValueError(f"a low-rank delta must be (d1, r) @ (r, d0) with r >= 1, got {tuple(self.up.shape)} and {tuple(self.down.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the delta is added to."""
        return tuple(self.up.shape) if self.down is None else (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int | None:
        """Rank of the factors; ``None`` for a dense delta."""
        return None if self.down is None else self.down.shape[0]

    def dense(self) -> Tensor:
        """Return the dense delta in float32, or in float64 if a factor is float64.

        The product is computed in float64 and rounded once, so that the result practically never depends on the number of threads.
        """
        if self.down is None:
            return self.up
        wide = torch.promote_types(self.up.dtype, self.down.dtype)
        return (self.up.double() @ self.down.double()).to(wide)

    def dot(self, other: Delta) -> float:
        """Return the Frobenius inner product, without computing the product of low-rank factors."""
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
        """Return the cosine similarity to another delta of the same shape; 0 if one of them is zero."""
        norms = self.norm * other.norm
        return self.dot(other) / norms if norms else 0.0

    def share_in_rows_of(self, other: Delta) -> float | None:
        """Return the share, 0 to 1, of the squared norm of this delta in the row space of a low-rank delta; ``None`` if that delta is dense."""
        if other.down is None:
            return None
        basis = _row_basis(other.up.double(), other.down.double())
        projected = self.up.double() @ basis if self.down is None else self.up.double() @ (self.down.double() @ basis)
        energy = self.dot(self)
        return float(projected.square().sum()) / energy if energy else 0.0


def _row_basis(up: Tensor, down: Tensor) -> Tensor:
    """Return an orthonormal basis ``(d0, k)`` of the row space of ``up @ down``, without directions below the rounding error of float32 factors."""
    right, right_core = torch.linalg.qr(down.T)
    core = torch.linalg.qr(up, mode="r").R @ right_core.T
    _, values, rows = torch.linalg.svd(core, full_matrices=False)
    significant = values > values[0] * max(up.shape[0], down.shape[1]) * torch.finfo(torch.float32).eps
    basis: Tensor = right @ rows[significant].T
    return basis


def _to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU in float32 or float64."""
    if not tensor.is_floating_point():
        raise ValueError(f"a delta must be a floating-point tensor, got {tensor.dtype}")
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    copied = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not copied.isfinite().all():
        raise ValueError("a delta must be finite, got infinite or nan values")
    return copied
