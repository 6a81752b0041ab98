"""Interactions of point embeddings, in which a relation is a translation, scaling or rotation.

Shapes: B queries, E entities, N rows, D width of a part, W width of a row of an entity (D, or 2D if complex). Complex rows are ``[Re | Im]``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from malleable.lightning_modules.functional.graphs.interaction import Interaction, Map, Vectors
from malleable.lightning_modules.functional.graphs.squared_distance import folded_key, squared_distance_query


class Translation(Interaction):
    """Squared distance after a translation: ``|h + r - t|^2``.

    Source:
        Bordes et al. (2013), Translating Embeddings for Modeling Multi-relational Data, NeurIPS 26.
        Differs: the squared L2 norm (one of the two norms in section 2), and no projection to the unit sphere.
    """

    entity_parts = ("mu",)
    relation_parts = ("b",)

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return ``2 (h + r)``, ``(B, D)``, and ``-|h + r|^2``, ``(B,)``."""
        return squared_distance_query(head + relation)

    def key(self, entity: Tensor) -> Vectors:
        """Return ``t``, ``(E, W)``, and ``-|t|^2``, ``(E,)``."""
        return folded_key(entity, entity.shape[-1])

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> y + r``."""
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
        """Return ``h r``, ``(B, D)``."""
        return Vectors(head * relation)

    def key(self, entity: Tensor) -> Vectors:
        """Return ``t``, ``(E, W)``."""
        return Vectors(entity)

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> r y``."""
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
        """Return ``[Re h r | Im h r]``, ``(B, 2D)``."""
        return Vectors(complex_product(head, *relation.chunk(2, -1)))

    def location(self, entity: Tensor) -> Tensor:
        """Return the entity as a complex vector, ``(N, D)``."""
        return torch.complex(*entity.chunk(2, -1))

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> r y``."""
        scale = torch.complex(*relation.chunk(2, -1))
        return Map(scale, torch.zeros_like(scale))


class Rotation(Interaction):
    """Squared distance after a rotation of each complex coordinate: ``|h exp(i theta) - t|^2``.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 3.
        Differs: the squared L2 norm instead of the sum of moduli, which is not an inner product.
    """

    entity_parts = ("real", "imaginary")
    relation_parts = ("phase",)
    complex_parts = True

    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return twice the rotated head, ``(B, 2D)``, and ``-|h|^2``, ``(B,)``; a rotation does not change the norm."""
        return Vectors(2 * complex_product(head, relation.cos(), relation.sin()), -head.square().sum(-1))

    def key(self, entity: Tensor) -> Vectors:
        """Return ``t``, ``(E, W)``, and ``-|t|^2``, ``(E,)``."""
        return folded_key(entity, entity.shape[-1])

    def location(self, entity: Tensor) -> Tensor:
        """Return the entity as a complex vector, ``(N, D)``."""
        return torch.complex(*entity.chunk(2, -1))

    def flow(self, relation: Tensor) -> Map:
        """Return the map ``y -> exp(i theta) y``."""
        scale = torch.polar(torch.ones_like(relation), relation)
        return Map(scale, torch.zeros_like(scale))


def complex_product(left: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Multiply rows ``[Re | Im]``, ``(N, 2D)``, by complex numbers ``real + i imaginary``, ``(N, D)`` each; return ``(N, 2D)``."""
    left_real, left_imaginary = left.chunk(2, -1)
    return torch.cat([left_real * real - left_imaginary * imaginary, left_real * imaginary + left_imaginary * real], -1)
