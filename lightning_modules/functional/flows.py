"""Interactions of knowledge-graph embeddings: normalizing flows and point vectors, all as one inner product with biases.

An entity is a random variable ``f_e(x)`` or a point, a relation a map of it. Every interaction turns a query ``(h, r)`` and an
entity into a vector and a bias each, so that

    score(h, r, t) = query.vector . key.vector + query.bias + key.bias

and the scores of all entities are one matrix product. Margins (gamma) belong to the caller.

Shapes: B queries, E entities, N rows, D width of a part, W width of the product. A row of a table holds its parts one after another:
``[mu | s]``, ``[mu | s_neg | s_pos]`` for entities, ``[b | a]`` (translation, scale) for relations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Base = Literal["normal", "uniform"]
# c = 2 E[x; x > 0] of a base of mean 0 and variance 1.
CROSS_TERM: dict[str, float] = {"normal": math.sqrt(2 / math.pi), "uniform": math.sqrt(3) / 2}


class Vectors(NamedTuple):
    """Rows whose inner products, with their biases, are scores.

    Attributes:
        vector: ``(N, W)``.
        bias: ``(N,)``, ``None`` for zero.
    """

    vector: Tensor
    bias: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Vectors:
        """Take some rows."""
        return Vectors(self.vector[index], None if self.bias is None else self.bias[index])

    def full(self) -> Vectors:
        """Widen half precision: ranks hang on small differences of large terms."""
        return Vectors(full(self.vector), None if self.bias is None else full(self.bias))


class Map(NamedTuple):
    """The map ``y -> scale y + shift`` of a relation, coordinate by coordinate; complex where entities are.

    Attributes:
        scale: ``(N, D)``.
        shift: ``(N, D)``.
    """

    scale: Tensor
    shift: Tensor

    def after(self, first: Map) -> Map:
        """Compose: this map of what ``first`` gives."""
        return Map(self.scale * first.scale, self.scale * first.shift + self.shift)


def full(part: Tensor) -> Tensor:
    """Widen half precision to single."""
    return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part


def score_all(query: Vectors, key: Vectors) -> Tensor:
    """Score every entity for every query, ``(B, E)``, by one product, in full precision whatever the run's."""
    query, key = query.full(), key.full()
    with torch.autocast(query.vector.device.type, enabled=False):
        return product(query, key)


def product(query: Vectors, key: Vectors) -> Tensor:
    """Multiply as it stands, ``(B, E)`` in memory of its own."""
    scores = query.vector @ key.vector.T if key.bias is None else torch.addmm(key.bias, query.vector, key.vector.T)
    return scores if query.bias is None else scores.add_(query.bias[:, None])


def score_pairs(query: Vectors, key: Vectors) -> Tensor:
    """Score row by row: entries of :func:`score_all` without the others.

    Args:
        query: ``(N, W)``.
        key: ``(N, W)``.

    Returns:
        ``(N,)``.
    """
    scores = (query.vector * key.vector).sum(-1)
    for bias in (query.bias, key.bias):
        scores = scores if bias is None else scores + bias
    return scores


class Interaction(ABC):
    """What a model makes of the rows of its tables.

    Attributes:
        entity_parts: Names of the parts of an entity row.
        relation_parts: Names of the parts of a relation row.
        distance: The score is minus a distance, to which a margin is added.
        complex_parts: Pairs of parts are real and imaginary parts of complex numbers.
    """

    entity_parts: ClassVar[tuple[str, ...]]
    relation_parts: ClassVar[tuple[str, ...]]
    distance: ClassVar[bool] = True
    complex_parts: ClassVar[bool] = False

    @abstractmethod
    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Turn rows of heads ``(B, parts x D)`` and relations ``(B, parts x D)`` into the query's side."""

    @abstractmethod
    def key(self, entity: Tensor) -> Vectors:
        """Turn rows of entities ``(E, parts x D)`` into the entity's side."""

    def deviation(self, entity: Tensor) -> Tensor | None:
        """Standard deviation of each coordinate, ``(N, D)``; ``None`` for points."""
        return None

    def location(self, entity: Tensor) -> Tensor | None:
        """Where an entity lies, ``(N, D)``, complex where the model is; ``None`` where it has no location."""
        return entity

    def flow(self, relation: Tensor) -> Map:
        """The map that a relation makes of locations (of deviations, where there are no locations)."""
        raise NotImplementedError(f"{type(self).__name__} gives a relation no map of its own")


class NFE1(Interaction):
    """Mean-squared distance of two affine flows: ``|m - mu|^2 + |sigma_1 - sigma_2|^2``.

    ``m = a mu_h + b``, ``sigma_1 = |a s_h|`` and ``sigma_2 = |s_t|``.
    With a Gaussian base it is the squared 2-Wasserstein distance of diagonal Gaussians.

    Source:
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764, NFE-1.
    """

    entity_parts: ClassVar[tuple[str, ...]] = ("mu", "s")
    relation_parts = ("b", "a")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``2 [m | sigma_1]`` and minus the squared norm."""
        shift, scale = relation.chunk(2, -1)
        mean, slope = head.chunk(2, -1)
        return squared_distance_query(torch.cat([torch.addcmul(shift, scale, mean), (scale * slope).abs()], -1))

    def key(self, entity: Tensor) -> Vectors:
        """``[mu | |s|]`` and minus the squared norm."""
        return folded_key(entity, entity.shape[-1] // 2)

    def deviation(self, entity: Tensor) -> Tensor:
        """``|s|``."""
        return entity.chunk(2, -1)[1].abs()

    def location(self, entity: Tensor) -> Tensor:
        """``mu``."""
        return entity.chunk(2, -1)[0]

    def flow(self, relation: Tensor) -> Map:
        """``y -> a y + b``."""
        shift, scale = relation.chunk(2, -1)
        return Map(scale, shift)


@dataclass(frozen=True)
class NFE2(NFE1):
    """Mean-squared distance of two flows with one slope on either side of zero.

    ``|dm|^2 + |dalpha|^2 / 2 + |dbeta|^2 / 2 + c dm . (dbeta - dalpha)``, alpha the slopes below and beta those above zero. The
    quadratic form ``M`` of ``(m, alpha, beta)`` is positive definite: a squared distance, whose inner product is ``(M q) . k``.

    Args:
        base: Base variable: standard normal, or uniform of variance one.
        swap_on_negative_scale: Let a negative scale exchange the two slopes, as the flow does; the authors' code takes absolute values only.

    Source:
        As :class:`NFE1`, NFE-2.
        Differs: one product in 3D instead of five in D.
    """

    base: Base = "normal"
    swap_on_negative_scale: bool = False

    entity_parts = ("mu", "s_neg", "s_pos")

    def __post_init__(self) -> None:
        """Refuse another base."""
        if self.base not in CROSS_TERM:
            raise ValueError(f"base must be one of {sorted(CROSS_TERM)}, got {self.base!r}")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``2 M [m | alpha_1 | beta_1]`` and minus the form's value."""
        shift, scale = relation.chunk(2, -1)
        mean, below, above = head.chunk(3, -1)
        if self.swap_on_negative_scale:
            below, above = torch.where(scale < 0, above, below), torch.where(scale < 0, below, above)
        parts = torch.addcmul(shift, scale, mean), (scale * below).abs(), (scale * above).abs()
        mapped = slope_form(*parts, CROSS_TERM[self.base])
        return Vectors(2 * mapped, -(mapped * torch.cat(parts, -1)).sum(-1))

    def key(self, entity: Tensor) -> Vectors:
        """``[mu | |s_neg| | |s_pos|]`` and minus the form's value."""
        return folded_key(entity, entity.shape[-1] // 3, CROSS_TERM[self.base])

    def deviation(self, entity: Tensor) -> Tensor:
        """Standard deviation of ``f(x)``: ``E f^2 = (alpha^2 + beta^2) / 2`` and ``E f = c (beta - alpha) / 2``, both about mu."""
        _, below, above = entity.chunk(3, -1)
        offset = CROSS_TERM[self.base] / 2 * (above.abs() - below.abs())
        return ((below.square() + above.square()) / 2 - offset.square()).clamp_min(0).sqrt()

    def location(self, entity: Tensor) -> Tensor:
        """``mu``."""
        return entity.chunk(3, -1)[0]


@dataclass(frozen=True)
class NFE3(NFE1):
    """Kullback-Leibler divergence of Gaussians, query first: ``KL(N(m, sigma_1^2) || N(mu, sigma_2^2))``.

    ``sigma_1 = softplus(a) softplus(s_h)`` and ``sigma_2 = softplus(s_t)``; the mean takes ``a`` itself.

    Args:
        consistent: Scale deviations by ``|a|``, as the flow does.
        min_deviation: Floor of every deviation, > 0: the inverse square of one that vanishes has no bound.

    Source:
        As :class:`NFE1`, NFE-3.
        Differs: the floor; one product instead of three.
    """

    consistent: bool = False
    min_deviation: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse a floor that is none."""
        if self.min_deviation <= 0:
            raise ValueError(f"min_deviation must be > 0, got {self.min_deviation}")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``[-(sigma_1^2 + m^2) / 2 | m]`` and ``sum log sigma_1 + D / 2``."""
        shift, scale = relation.chunk(2, -1)
        mean, slope = head.chunk(2, -1)
        mapped = torch.addcmul(shift, scale, mean)
        deviation = ((scale.abs() if self.consistent else F.softplus(scale)) * F.softplus(slope)).clamp_min(self.min_deviation)
        vector = torch.cat([(deviation.square() + mapped.square()) / -2, mapped], -1)
        return Vectors(vector, deviation.log().sum(-1) + mapped.shape[-1] / 2)

    def key(self, entity: Tensor) -> Vectors:
        """``[sigma_2^-2 | mu sigma_2^-2]`` and ``-sum log sigma_2 - sum mu^2 / (2 sigma_2^2)``."""
        return Vectors(*_PrecisionKey.apply(entity, self.min_deviation))  # type: ignore[no-untyped-call]

    def deviation(self, entity: Tensor) -> Tensor:
        """``softplus(s)``, floored."""
        return F.softplus(entity.chunk(2, -1)[1]).clamp_min(self.min_deviation)


class AffinePoint(Interaction):
    """The affine group acting on points: ``|a mu_h + b - mu_t|^2``; NFE without uncertainty.

    Source:
        As :class:`NFE1`, the ablation without uncertainty.
        Differs: no slopes are allocated.
    """

    entity_parts = ("mu",)
    relation_parts = ("b", "a")

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``2 (a mu_h + b)`` and minus the squared norm."""
        shift, scale = relation.chunk(2, -1)
        return squared_distance_query(torch.addcmul(shift, scale, head))

    def key(self, entity: Tensor) -> Vectors:
        """``mu`` and minus the squared norm."""
        return folded_key(entity, entity.shape[-1])

    def flow(self, relation: Tensor) -> Map:
        """``y -> a y + b``."""
        shift, scale = relation.chunk(2, -1)
        return Map(scale, shift)


class Sigma(Interaction):
    """Deviations alone: ``||a s_h| - |s_t||^2``, written NFE-1-sigma.

    Source:
        As :class:`NFE1`, the ablation of the mean.
        Differs: no means and translations are allocated.
    """

    entity_parts = ("s",)
    relation_parts = ("a",)

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``2 |a s_h|`` and minus the squared norm."""
        return squared_distance_query((relation * head).abs())

    def key(self, entity: Tensor) -> Vectors:
        """``|s|`` and minus the squared norm."""
        return folded_key(entity, 0)

    def deviation(self, entity: Tensor) -> Tensor:
        """``|s|``."""
        return entity.abs()

    def location(self, entity: Tensor) -> None:
        """There is none."""

    def flow(self, relation: Tensor) -> Map:
        """``sigma -> |a| sigma``."""
        return Map(relation.abs(), torch.zeros_like(relation))


class Translation(Interaction):
    """Squared distance after a translation: ``|h + r - t|^2``.

    Source:
        Bordes et al. (2013), Translating Embeddings for Modeling Multi-relational Data, NeurIPS 26.
        Differs: the squared L2 norm (named among the two of section 2), and no projection to the unit sphere.
    """

    entity_parts = ("mu",)
    relation_parts = ("b",)

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``2 (h + r)`` and minus the squared norm."""
        return squared_distance_query(head + relation)

    def key(self, entity: Tensor) -> Vectors:
        """``t`` and minus the squared norm."""
        return folded_key(entity, entity.shape[-1])

    def flow(self, relation: Tensor) -> Map:
        """``y -> y + r``."""
        return Map(torch.ones_like(relation), relation)


class Diagonal(Interaction):
    """Trilinear product ``<h, r, t>``.

    Source:
        Yang et al. (2015), Embedding Entities and Relations for Learning and Inference in Knowledge Bases, arXiv:1412.6575, Eq. 3 (DistMult).
    """

    entity_parts: ClassVar[tuple[str, ...]] = ("mu",)
    relation_parts: ClassVar[tuple[str, ...]] = ("a",)
    distance = False

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``h r``."""
        return Vectors(head * relation)

    def key(self, entity: Tensor) -> Vectors:
        """The entity itself."""
        return Vectors(entity)

    def flow(self, relation: Tensor) -> Map:
        """``y -> r y``."""
        return Map(relation, torch.zeros_like(relation))


class ComplexDiagonal(Diagonal):
    """``Re <h, r, conj t>`` of complex vectors.

    Source:
        Trouillon et al. (2016), Complex Embeddings for Simple Link Prediction, arXiv:1606.06357, Eq. 11 (ComplEx).
    """

    entity_parts = ("real", "imaginary")
    relation_parts = ("real", "imaginary")
    complex_parts = True

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """``[Re h r | Im h r]``."""
        return Vectors(complex_product(head, *relation.chunk(2, -1)))

    def location(self, entity: Tensor) -> Tensor:
        """The complex vector."""
        return torch.complex(*entity.chunk(2, -1))

    def flow(self, relation: Tensor) -> Map:
        """``y -> r y``."""
        scale = torch.complex(*relation.chunk(2, -1))
        return Map(scale, torch.zeros_like(scale))


class Rotation(Interaction):
    """Squared distance after a rotation of each complex coordinate: ``|h exp(i theta) - t|^2``.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 3.
        Differs: the squared L2 norm instead of the sum of moduli, which is no inner product.
    """

    entity_parts = ("real", "imaginary")
    relation_parts = ("phase",)
    complex_parts = True

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Twice the rotated head; a rotation keeps the norm."""
        return Vectors(2 * complex_product(head, relation.cos(), relation.sin()), -head.square().sum(-1))

    def key(self, entity: Tensor) -> Vectors:
        """``t`` and minus the squared norm."""
        return folded_key(entity, entity.shape[-1])

    def location(self, entity: Tensor) -> Tensor:
        """The complex vector."""
        return torch.complex(*entity.chunk(2, -1))

    def flow(self, relation: Tensor) -> Map:
        """``y -> exp(i theta) y``."""
        scale = torch.polar(torch.ones_like(relation), relation)
        return Map(scale, torch.zeros_like(scale))


def squared_distance_query(point: Tensor) -> Vectors:
    """The query's side of ``-|q - k|^2``."""
    return Vectors(2 * point, -point.square().sum(-1))


def slope_form(mean: Tensor, below: Tensor, above: Tensor, cross: float) -> Tensor:
    """``M (mean, below, above)`` with ``M = [[1, -c/2, c/2], [-c/2, 1/2, 0], [c/2, 0, 1/2]]``, coordinate by coordinate, ``(N, 3D)``."""
    half = cross / 2
    return torch.cat([torch.add(mean, above - below, alpha=half), below / 2 - half * mean, torch.add(above / 2, mean, alpha=half)], -1)


def folded_key(entity: Tensor, first: int, cross: float | None = None) -> Vectors:
    """The entity's side of minus a squared distance: the row with absolute values from column ``first`` on, and minus its square.

    Args:
        entity: ``(N, W)``.
        first: First column whose sign does not count.
        cross: c of :func:`slope_form`, in which three parts are squared; ``None`` for the plain square.
    """
    return Vectors(*_FoldedKey.apply(entity, first, cross))  # type: ignore[no-untyped-call]


class _FoldedKey(torch.autograd.Function):
    """One pass over the rows each way, where the single operations make ten."""

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


class _PrecisionKey(torch.autograd.Function):
    """The key of NFE-3 with its derivatives written out, which is half the passes."""

    @staticmethod
    def forward(ctx: Any, entity: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        mean, slope = entity.chunk(2, -1)
        deviation = F.softplus(slope).clamp_min_(floor)
        vector = torch.empty_like(entity)
        precision, weighted = vector.chunk(2, -1)
        torch.mul(deviation, deviation, out=precision).reciprocal_()
        torch.mul(mean, precision, out=weighted)
        bias = deviation.log().addcmul_(mean, weighted, value=0.5).sum(-1).neg_()
        ctx.floor = floor
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
        # By the precision: first + mu second - bias mu^2 / 2; then by the deviation: -2 deviation^-3 of that, and -bias / deviation.
        by_precision = torch.addcmul(second, bias, mean, value=-0.5).mul_(mean).add_(first)
        torch.addcmul(bias, precision, by_precision, value=2, out=of_slope).mul_(precision.sqrt()).neg_()
        # At the floor, up to rounding, the deviation no longer follows the slope.
        of_slope.mul_(slope.sigmoid()).masked_fill_(precision >= (1 - 1e-6) * ctx.floor**-2, 0.0)
        return gradient, None


def complex_product(left: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Multiply ``[Re | Im]`` rows by complex numbers, ``(N, 2D)``."""
    left_real, left_imaginary = left.chunk(2, -1)
    return torch.cat([left_real * real - left_imaginary * imaginary, left_real * imaginary + left_imaginary * real], -1)
