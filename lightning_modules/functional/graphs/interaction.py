"""How knowledge-graph embeddings score: every interaction as one inner product with biases.

An interaction turns a query ``(h, r)`` and an entity into a vector and a bias each, so that

    score(h, r, t) = query.vector . key.vector + query.bias + key.bias

and the scores of all entities are one matrix product. Margins (gamma) belong to the caller.

Shapes: B queries, E entities, N rows, D width of a part, W width of the product. A row of a table holds its parts one after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.functional.precision import exact_products, full, full_precision

# Products of fewer rows take kernels in which the order of summation depends on the column, so that equal columns differ in the last bit.
MIN_ROWS = 8


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
        """Convert half precision to single precision."""
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


@full_precision
def score_all(query: Vectors, key: Vectors) -> Tensor:
    """Score every entity for every query, ``(B, E)``, by one product in full precision.

    Entities with equal rows have equal scores, bit for bit, whatever B.
    """
    query, key = query.full(), key.full()
    missing = MIN_ROWS - len(query.vector)
    if missing > 0:
        query = Vectors(F.pad(query.vector, (0, 0, 0, missing)), None if query.bias is None else F.pad(query.bias, (0, missing)))
    with exact_products():
        scores = product(query, key)
    return scores[: len(scores) - missing] if missing > 0 else scores


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
