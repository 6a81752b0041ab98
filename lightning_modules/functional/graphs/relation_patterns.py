"""Which relations undo themselves, undo one another, or follow from two others: read off the maps they make.

Two maps are compared by what they make of the entities: the mean squared difference over the entities, over the mean spread of both results. 0 is
equality; maps that have nothing in common differ by 2 or more.

Shapes: R relations, E entities, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.functional.graphs.interaction import Map

ROWS = 1 << 14  # entities widened at a time


class Moments(NamedTuple):
    """Where entities lie.

    Attributes:
        mean: ``(D,)``, complex where entities are.
        variance: ``(D,)`` real.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, location: Tensor) -> Moments:
        """Moments of ``(E, D)`` locations, in double precision."""
        kind = torch.complex128 if location.is_complex() else torch.double
        parts = torch.split(location, ROWS)
        mean = torch.stack([part.to(kind).sum(0) for part in parts]).sum(0) / len(location)
        squares = [(part.to(kind) - mean).abs().square().sum(0) for part in parts]
        return cls(mean, torch.stack(squares).sum(0) / len(location))

    def place(self, flow: Map) -> Tensor:
        """A point for each map, ``(R, 2D)`` (complex: ``4D``): squared distances are mean squared differences over the entities.

        ``E |a mu + b|^2 = |a|^2 Var mu + |a E mu + b|^2``.
        """
        point = torch.cat([flow.scale * self.variance.sqrt(), flow.scale * self.mean + flow.shift], -1)
        return torch.view_as_real(point).flatten(-2) if point.is_complex() else point

    def spread(self, flow: Map) -> Tensor:
        """Variance of what each map makes of the entities, ``(R,)``."""
        return (flow.scale.abs().square() * self.variance).sum(-1)


def neutral(flow: Map) -> Map:
    """The map that changes nothing, ``(1, D)``."""
    return Map(torch.ones_like(flow.scale[:1]), torch.zeros_like(flow.shift[:1]))


def differences(first: Map, second: Map, moments: Moments) -> Tensor:
    """Compare every map of one set with every map of another, ``(R1, R2)``."""
    left, right = moments.place(first), moments.place(second)
    squares = left.square().sum(-1)[:, None] + right.square().sum(-1) - 2 * left @ right.T
    spread = (moments.spread(first)[:, None] + moments.spread(second)) / 2
    return squares.clamp_min(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def self_inverse(flow: Map, moments: Moments) -> Tensor:
    """How far each relation applied twice is from changing nothing, ``(R,)``: 0 for symmetric relations."""
    return differences(flow.after(flow), neutral(flow), moments)[:, 0]


def inverse(flow: Map, moments: Moments) -> Tensor:
    """How far relation ``j`` after relation ``i`` is from changing nothing, ``(R, R)``."""
    return torch.stack([differences(flow.after(_row(flow, i)), neutral(flow), moments)[:, 0] for i in range(len(flow.scale))])


def composition(flow: Map, moments: Moments) -> tuple[Tensor, Tensor]:
    """Find the relation nearest to relation ``j`` after relation ``i``, other than both.

    Returns:
        ``(R, R)`` differences, ``inf`` where no third relation is left, and ``(R, R)`` its number.
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
