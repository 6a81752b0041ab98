"""Score functions of knowledge-graph embeddings as inner products with biases.

An interaction maps a query ``(h, r)`` and an entity ``t`` to a vector and a bias each, so that

    score(h, r, t) = query.vector . key.vector + query.bias + key.bias

and the scores of all entities are one matrix product. The caller adds the margin (gamma).

Shapes: B queries, E entities, N rows, D width of a part, W width of query and key vectors. A row of a table is the concatenation of its parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.functional.precision import exact_products, full, full_precision

# Kernels for fewer rows sum in an order that depends on the column, so that the scores of equal columns could differ in the last bit.
MIN_ROWS = 8


class Vectors(NamedTuple):
    """Vectors and biases of queries or entities. A score is the inner product of two vectors plus both biases.

    Attributes:
        vector: ``(N, W)``.
        bias: ``(N,)``; ``None`` means zero.
    """

    vector: Tensor
    bias: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Vectors:
        """Return the rows at ``index``."""
        return Vectors(self.vector[index], None if self.bias is None else self.bias[index])

    def full(self) -> Vectors:
        """Convert half precision to single precision."""
        return Vectors(full(self.vector), None if self.bias is None else full(self.bias))


class Map(NamedTuple):
    """Elementwise map ``y -> scale y + shift`` of a relation; complex if entities are complex.

    Attributes:
        scale: ``(N, D)``.
        shift: ``(N, D)``.
    """

    scale: Tensor
    shift: Tensor

    def after(self, first: Map) -> Map:
        """Return the composition that applies ``first``, then this map."""
        return Map(self.scale * first.scale, self.scale * first.shift + self.shift)


@full_precision
def score_all(query: Vectors, key: Vectors) -> Tensor:
    """Score every entity for every query by one product in full precision.

    Entities with equal rows have bitwise equal scores for any B.

    Args:
        query: ``(B, W)``.
        key: ``(E, W)``.

    Returns:
        ``(B, E)``.
    """
    query, key = query.full(), key.full()
    missing = MIN_ROWS - len(query.vector)
    if missing > 0:
        query = Vectors(F.pad(query.vector, (0, 0, 0, missing)), None if query.bias is None else F.pad(query.bias, (0, missing)))
    with exact_products():
        scores = product(query, key)
    return scores[: len(scores) - missing] if missing > 0 else scores


def product(query: Vectors, key: Vectors) -> Tensor:
    """Compute the scores ``(B, E)`` of queries ``(B, W)`` and entities ``(E, W)`` in the current precision, as a new tensor."""
    scores = query.vector @ key.vector.T if key.bias is None else torch.addmm(key.bias, query.vector, key.vector.T)
    return scores if query.bias is None else scores.add_(query.bias[:, None])


def score_pairs(query: Vectors, key: Vectors) -> Tensor:
    """Score the query in each row with the entity in the same row of ``key``.

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
    """Base class of score functions.

    Attributes:
        entity_parts: Names of the parts of an entity row.
        relation_parts: Names of the parts of a relation row.
        distance: Whether the score is a negative distance, to which a margin is added.
        complex_parts: Whether pairs of parts are the real and imaginary parts of complex numbers.
    """

    entity_parts: ClassVar[tuple[str, ...]]
    relation_parts: ClassVar[tuple[str, ...]]
    distance: ClassVar[bool] = True
    complex_parts: ClassVar[bool] = False

    @abstractmethod
    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Map rows of heads ``(B, parts x D)`` and relations ``(B, parts x D)`` to query vectors ``(B, W)`` and biases ``(B,)``."""

    @abstractmethod
    def key(self, entity: Tensor) -> Vectors:
        """Map rows of entities ``(E, parts x D)`` to key vectors ``(E, W)`` and biases ``(E,)``."""

    def deviation(self, entity: Tensor) -> Tensor | None:
        """Return the standard deviation of each coordinate, ``(N, D)``, from rows of entities ``(N, parts x D)``; ``None`` if entities are points."""
        return None

    def location(self, entity: Tensor) -> Tensor | None:
        """Return the location of each entity in the embedding space: its point, or the mean of its distribution.

        Args:
            entity: ``(N, parts x D)`` rows of entities.

        Returns:
            ``(N, D)``, complex for complex models; ``None`` if entities have only deviations.
        """
        return entity

    def flow(self, relation: Tensor) -> Map:
        """Return the map of locations that each relation, given by its row ``(N, parts x D)``, defines; without locations, the map of deviations."""
        raise NotImplementedError(f"{type(self).__name__} does not define maps of relations; override flow")
