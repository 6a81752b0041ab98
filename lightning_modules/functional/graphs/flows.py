"""Interactions of normalizing flows: an entity is a random variable ``f_e(x)``, a relation is an affine map of it.

Shapes: B queries, E entities, N rows, D width of a part. A row of a table is the concatenation of its parts: ``[mu | s]`` or
``[mu | s_neg | s_pos]`` for entities, ``[b | a]`` (translation, scale) for relations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from malleable.lightning_modules.functional.graphs.interaction import Interaction, Map, Vectors
from malleable.lightning_modules.functional.graphs.squared_distance import folded_key, slope_form, squared_distance_query

Base = Literal["normal", "uniform"]
# c = 2 E[x; x > 0] for a base of mean 0 and variance 1.
CROSS_TERM: dict[str, float] = {"normal": math.sqrt(2 / math.pi), "uniform": math.sqrt(3) / 2}


class NFE1(Interaction):
    """Mean-squared distance of two affine flows: ``|m - mu|^2 + |sigma_1 - sigma_2|^2``.

    ``m = a mu_h + b``, ``sigma_1 = |a s_h|`` and ``sigma_2 = |s_t|``.
    For a Gaussian base, this is the squared 2-Wasserstein distance of diagonal Gaussians.

    Source:
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764, NFE-1.
    """

    entity_parts: ClassVar[tuple[str, ...]] = ("mu", "s")
    relation_parts = ("b", "a")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``2 [m | sigma_1]``, ``(B, 2D)``, and minus the squared norm of ``[m | sigma_1]``, ``(B,)``."""
        shift, scale = relation.chunk(2, -1)
        mean, slope = head.chunk(2, -1)
        return squared_distance_query(torch.cat([torch.addcmul(shift, scale, mean), (scale * slope).abs()], -1))

    def key(self, entity: Tensor) -> Vectors:
        """Return ``[mu | |s|]``, ``(E, 2D)``, and minus its squared norm, ``(E,)``."""
        return folded_key(entity, entity.shape[-1] // 2)

    def deviation(self, entity: Tensor) -> Tensor:
        """Return ``|s|``, ``(N, D)``."""
        return entity.chunk(2, -1)[1].abs()

    def location(self, entity: Tensor) -> Tensor:
        """Return ``mu``, ``(N, D)``."""
        return entity.chunk(2, -1)[0]

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> a y + b``."""
        shift, scale = relation.chunk(2, -1)
        return Map(scale, shift)


@dataclass(frozen=True)
class NFE2(NFE1):
    """Mean-squared distance of two flows with different slopes below and above zero.

    ``|dm|^2 + |dalpha|^2 / 2 + |dbeta|^2 / 2 + c dm . (dbeta - dalpha)`` with slopes alpha below zero and beta above zero. The quadratic form ``M``
    of ``(m, alpha, beta)`` is positive definite, so this is a squared distance with the inner product ``(M q) . k``.

    Args:
        base: Base variable: ``normal`` (standard normal) or ``uniform`` (of variance 1).
        swap_on_negative_scale: Whether a negative scale exchanges the two slopes, as it does in the flow. The authors' code only takes absolute
            values.

    Raises:
        ValueError: If ``base`` is unknown.

    Source:
        As :class:`NFE1`, NFE-2.
        Differs: one product of width 3D instead of five of width D. Because c is irrational, scores that are equal only algebraically can differ in
        the last bit; entities with equal rows have equal scores.
    """

    base: Base = "normal"
    swap_on_negative_scale: bool = False

    entity_parts = ("mu", "s_neg", "s_pos")

    def __post_init__(self) -> None:
        """Check the base."""
        if self.base not in CROSS_TERM:
            raise ValueError(f"base must be one of {sorted(CROSS_TERM)}, got {self.base!r}")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``2 M q`` with ``q = [m | alpha_1 | beta_1]``, ``(B, 3D)``, and ``-q . M q``, ``(B,)``."""
        shift, scale = relation.chunk(2, -1)
        mean, below, above = head.chunk(3, -1)
        if self.swap_on_negative_scale:
            below, above = torch.where(scale < 0, above, below), torch.where(scale < 0, below, above)
        parts = torch.addcmul(shift, scale, mean), (scale * below).abs(), (scale * above).abs()
        mapped = slope_form(*parts, CROSS_TERM[self.base])
        return Vectors(2 * mapped, -(mapped * torch.cat(parts, -1)).sum(-1))

    def key(self, entity: Tensor) -> Vectors:
        """Return ``k = [mu | |s_neg| | |s_pos|]``, ``(E, 3D)``, and ``-k . M k``, ``(E,)``."""
        return folded_key(entity, entity.shape[-1] // 3, CROSS_TERM[self.base])

    def deviation(self, entity: Tensor) -> Tensor:
        """Return the standard deviation of ``f(x)``, ``(N, D)``.

        About mu, ``E f^2 = (alpha^2 + beta^2) / 2`` and ``E f = c (beta - alpha) / 2``.
        """
        _, below, above = entity.chunk(3, -1)
        offset = CROSS_TERM[self.base] / 2 * (above.abs() - below.abs())
        return ((below.square() + above.square()) / 2 - offset.square()).clamp_min(0).sqrt()

    def location(self, entity: Tensor) -> Tensor:
        """Return ``mu``, ``(N, D)``."""
        return entity.chunk(3, -1)[0]


@dataclass(frozen=True)
class NFE3(NFE1):
    """Kullback-Leibler divergence of Gaussians, query first: ``KL(N(m, sigma_1^2) || N(mu, sigma_2^2))``.

    ``sigma_1 = softplus(a) softplus(s_h)`` and ``sigma_2 = softplus(s_t)``; the mean is scaled by ``a`` itself.

    Args:
        consistent: Scale deviations by ``|a|``, as the flow does, instead of ``softplus(a)``.
        min_deviation: Lower bound of every deviation, > 0: the divergence contains their inverse squares.

    Raises:
        ValueError: If ``min_deviation`` <= 0.

    Source:
        As :class:`NFE1`, NFE-3.
        Differs: deviations have a lower bound; one product instead of three.
    """

    consistent: bool = False
    min_deviation: float = 1e-4

    def __post_init__(self) -> None:
        """Check the lower bound."""
        if self.min_deviation <= 0:
            raise ValueError(f"min_deviation must be > 0, got {self.min_deviation}")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``[-(sigma_1^2 + m^2) / 2 | m]``, ``(B, 2D)``, and ``sum log sigma_1 + D / 2``, ``(B,)``."""
        shift, scale = relation.chunk(2, -1)
        mean, slope = head.chunk(2, -1)
        mapped = torch.addcmul(shift, scale, mean)
        deviation = ((scale.abs() if self.consistent else F.softplus(scale)) * F.softplus(slope)).clamp_min(self.min_deviation)
        vector = torch.cat([(deviation.square() + mapped.square()) / -2, mapped], -1)
        return Vectors(vector, deviation.log().sum(-1) + mapped.shape[-1] / 2)

    def key(self, entity: Tensor) -> Vectors:
        """Return ``[sigma_2^-2 | mu sigma_2^-2]``, ``(E, 2D)``, and ``-sum log sigma_2 - sum mu^2 / (2 sigma_2^2)``, ``(E,)``."""
        return Vectors(*_PrecisionKey.apply(entity, self.min_deviation))  # type: ignore[no-untyped-call]

    def deviation(self, entity: Tensor) -> Tensor:
        """Return ``softplus(s)``, at least ``min_deviation``, ``(N, D)``."""
        return F.softplus(entity.chunk(2, -1)[1]).clamp_min(self.min_deviation)


class AffinePoint(Interaction):
    """Squared distance of points under affine maps, ``|a mu_h + b - mu_t|^2``: NFE without uncertainty.

    Source:
        As :class:`NFE1`, the ablation without uncertainty.
        Differs: no slopes are allocated.
    """

    entity_parts = ("mu",)
    relation_parts = ("b", "a")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``2 m`` with ``m = a mu_h + b``, ``(B, D)``, and ``-|m|^2``, ``(B,)``."""
        shift, scale = relation.chunk(2, -1)
        return squared_distance_query(torch.addcmul(shift, scale, head))

    def key(self, entity: Tensor) -> Vectors:
        """Return ``mu``, ``(E, D)``, and ``-|mu|^2``, ``(E,)``."""
        return folded_key(entity, entity.shape[-1])

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> a y + b``."""
        shift, scale = relation.chunk(2, -1)
        return Map(scale, shift)


class Sigma(Interaction):
    """Squared distance of deviations only, ``||a s_h| - |s_t||^2`` (NFE-1-sigma).

    Source:
        As :class:`NFE1`, the ablation without means.
        Differs: no means and translations are allocated.
    """

    entity_parts = ("s",)
    relation_parts = ("a",)

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``2 |a s_h|``, ``(B, D)``, and ``-|a s_h|^2``, ``(B,)``."""
        return squared_distance_query((relation * head).abs())

    def key(self, entity: Tensor) -> Vectors:
        """Return ``|s|``, ``(E, D)``, and ``-|s|^2``, ``(E,)``."""
        return folded_key(entity, 0)

    def deviation(self, entity: Tensor) -> Tensor:
        """Return ``|s|``, ``(N, D)``."""
        return entity.abs()

    def location(self, entity: Tensor) -> None:
        """Return ``None``: entities have only deviations."""

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``sigma -> |a| sigma`` of deviations."""
        return Map(relation.abs(), torch.zeros_like(relation))


class _PrecisionKey(torch.autograd.Function):
    """Key of NFE-3 with an explicit backward pass, which needs half as many passes over the rows as autograd."""

    @staticmethod
    def forward(ctx: Any, entity: Tensor, min_deviation: float) -> tuple[Tensor, Tensor]:
        mean, slope = entity.chunk(2, -1)
        deviation = F.softplus(slope).clamp_min_(min_deviation)
        vector = torch.empty_like(entity)
        precision, weighted = vector.chunk(2, -1)
        torch.mul(deviation, deviation, out=precision).reciprocal_()
        torch.mul(mean, precision, out=weighted)
        bias = deviation.log().addcmul_(mean, weighted, value=0.5).sum(-1).neg_()
        ctx.min_deviation = min_deviation
        ctx.save_for_backward(entity, vector)
        return vector, bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vector: Tensor, bias: Tensor) -> tuple[Tensor, None]:
        entity, key = ctx.saved_tensors
        (mean, slope), (precision, weighted), (first, second) = (part.chunk(2, -1) for part in (entity, key, vector))
        bias = bias[..., None]
        gradient = torch.empty_like(entity)
        of_mean, of_slope = gradient.chunk(2, -1)
        torch.mul(second, precision, out=of_mean).addcmul_(bias, weighted, value=-1)
        # Derivative by the precision: first + mu second - bias mu^2 / 2. By the deviation: -2 deviation^-3 times that, minus bias / deviation.
        by_precision = torch.addcmul(second, bias, mean, value=-0.5).mul_(mean).add_(first)
        torch.addcmul(bias, precision, by_precision, value=2, out=of_slope).mul_(precision.sqrt()).neg_()
        # Where the deviation is clamped (up to rounding), its derivative by the slope is 0.
        of_slope.mul_(slope.sigmoid()).masked_fill_(precision >= (1 - 1e-6) * ctx.min_deviation**-2, 0.0)
        return gradient, None
