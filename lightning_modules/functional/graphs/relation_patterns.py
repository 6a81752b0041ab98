"""Symmetric, inverse and composed relations, found by comparing the maps of relations.

The difference of two maps is the mean squared distance of their results over all entities, divided by the mean variance of the results. It is 0 for
equal maps, and 2 or more for unrelated maps.

Shapes: R relations, E entities, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.functional.graphs.interaction import Map

ROWS = 1 << 14  # entities converted to double precision at once


class Moments(NamedTuple):
    """Mean and variance of the locations of the entities.

    Attributes:
        mean: ``(D,)``, complex if entities are complex.
        variance: ``(D,)``, real.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, location: Tensor) -> Moments:
        """Compute the moments of locations ``(E, D)`` in double precision."""
        kind = torch.complex128 if location.is_complex() else torch.double
        parts = torch.split(location, ROWS)
        mean = torch.stack([part.to(kind).sum(0) for part in parts]).sum(0) / len(location)
        squares = [(part.to(kind) - mean).abs().square().sum(0) for part in parts]
        return cls(mean, torch.stack(squares).sum(0) / len(location))

    def place(self, flow: Map) -> Tensor:
        """Map each relation to a point, so that squared distances of points are mean squared distances of results over the entities.

        ``E |a mu + b|^2 = |a|^2 Var mu + |a E mu + b|^2``.

        Returns:
            ``(R, 2D)``; for complex entities ``(R, 4D)``.
        """
        point = torch.cat([flow.scale * self.variance.sqrt(), flow.scale * self.mean + flow.shift], -1)
        return torch.view_as_real(point).flatten(-2) if point.is_complex() else point

    def spread(self, flow: Map) -> Tensor:
        """Compute the variance of the results of each map over the entities, ``(R,)``."""
        return (flow.scale.abs().square() * self.variance).sum(-1)


def identity_map(flow: Map) -> Map:
    """Return the identity map, ``(1, D)``, in the dtype of ``flow``."""
    return Map(torch.ones_like(flow.scale[:1]), torch.zeros_like(flow.shift[:1]))


def differences(first: Map, second: Map, moments: Moments) -> Tensor:
    """Compute the difference of every map of ``first`` and every map of ``second``, ``(R1, R2)``."""
    left, right = moments.place(first), moments.place(second)
    squares = left.square().sum(-1)[:, None] + right.square().sum(-1) - 2 * left @ right.T
    spread = (moments.spread(first)[:, None] + moments.spread(second)) / 2
    return squares.clamp_min(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def self_inverse(flow: Map, moments: Moments) -> Tensor:
    """Compute the difference between each relation applied twice and the identity, ``(R,)``; 0 for symmetric relations."""
    return differences(flow.after(flow), identity_map(flow), moments)[:, 0]


def inverse(flow: Map, moments: Moments) -> Tensor:
    """Compute the difference between relation ``j`` after relation ``i`` and the identity, ``(R, R)`` at ``[i, j]``; 0 for inverse relations."""
    return torch.stack([differences(flow.after(_row(flow, i)), identity_map(flow), moments)[:, 0] for i in range(len(flow.scale))])


def composition(flow: Map, moments: Moments) -> tuple[Tensor, Tensor]:
    """Find the relation that differs least from relation ``j`` after relation ``i``, except ``i`` and ``j``.

    Returns:
        Two tensors, ``(R, R)`` each: at ``[i, j]``, the difference of that relation, ``inf`` if there is no third relation, and its index.
    """
    found = []
    number = torch.arange(len(flow.scale), device=flow.scale.device)
    for i in range(len(flow.scale)):
        table = differences(flow.after(_row(flow, i)), flow, moments)
        table[:, i] = torch.inf
        table[number, number] = torch.inf
        found.append(table.min(1))
    return torch.stack([best.values for best in found]), torch.stack([best.indices for best in found])


def _row(flow: Map, index: int) -> Map:
    return Map(flow.scale[index : index + 1], flow.shift[index : index + 1])
