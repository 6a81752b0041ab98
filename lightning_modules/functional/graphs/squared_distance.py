"""Squared distances as inner products with biases, ``-|q - k|^2 = 2 q . k - |q|^2 - |k|^2``, with few passes over the entities.

Shapes: N rows, W width of query and key vectors, D = W / 3 width of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malleable.lightning_modules.functional.graphs.interaction import Vectors
from malleable.lightning_modules.functional.precision import full_precision


def squared_distance_query(point: Tensor) -> Vectors:
    """Return the query vectors and biases of ``-|q - k|^2`` for points ``(N, W)``."""
    return Vectors(2 * point, -point.square().sum(-1))


def slope_form(mean: Tensor, below: Tensor, above: Tensor, cross: float) -> Tensor:
    """Compute ``M (mean, below, above)`` with ``M = [[1, -c/2, c/2], [-c/2, 1/2, 0], [c/2, 0, 1/2]]`` for each coordinate.

    Args:
        mean: ``(N, D)``.
        below: ``(N, D)`` slopes below zero.
        above: ``(N, D)`` slopes above zero.
        cross: c.

    Returns:
        ``(N, 3D)``.
    """
    half = cross / 2
    return torch.cat([torch.add(mean, above - below, alpha=half), below / 2 - half * mean, torch.add(above / 2, mean, alpha=half)], -1)


@full_precision
def folded_key(entity: Tensor, first: int, cross: float | None = None) -> Vectors:
    """Return the key vectors and biases of a negative squared distance.

    The vector is the row with absolute values from column ``first`` on. The bias is minus its squared norm.

    Args:
        entity: ``(N, W)``.
        first: First column whose absolute value is used.
        cross: c of :func:`slope_form`, whose quadratic form is then the squared norm; ``None`` for the Euclidean norm.

    Returns:
        Vectors ``(N, W)`` and biases ``(N,)``.
    """
    return Vectors(*_FoldedKey.apply(entity, first, cross))  # type: ignore[no-untyped-call]


class _FoldedKey(torch.autograd.Function):
    """One pass over the rows in each direction; separate operations would need ten."""

    @staticmethod
    def forward(ctx: Any, entity: Tensor, first: int, cross: float | None) -> tuple[Tensor, Tensor]:
        vector = entity
        if first < entity.shape[-1]:
            vector = entity.clone()
            vector[..., first:].abs_()
        if cross is None:
            form, bias = vector, -torch.linalg.vector_norm(entity, dim=-1).square()
        else:
            mean, below, above = vector.chunk(3, -1)
            form = slope_form(mean, below, above, cross)
            bias = -torch.linalg.vecdot(vector, form)
        ctx.first = first
        ctx.save_for_backward(entity, form)
        return vector, bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector: Tensor, bias: Tensor) -> tuple[Tensor, None, None]:
        entity, form = ctx.saved_tensors
        gradient = torch.addcmul(vector, form, bias[..., None], value=-2)
        if ctx.first < entity.shape[-1]:
            gradient[..., ctx.first :].mul_(entity[..., ctx.first :].sgn())
        return gradient, None, None
