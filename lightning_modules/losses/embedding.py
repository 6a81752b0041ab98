"""Losses, negative sampling and regularisers of knowledge-graph embeddings.

To add a negative sampler, subclass :class:`NegativeSampling`, override ``draw``, and list the class in ``lightning_modules/__init__.pyi``.

Shapes: B queries, E entities, P true tails, K negatives, W width of query and key vectors, whose inner product is the score.

Unless stated otherwise, the loss of a true tail is a sum over entities, and the losses of the true tails are averaged. Losses therefore grow with the
number of entities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malleable.lightning_modules.functional.graphs.interaction import Vectors, score_pairs
from malleable.lightning_modules.functional.graphs.one_vs_all import KeyOf, Kind, one_vs_all_loss
from malleable.lightning_modules.functional.keyed_random import keyed_integers, mix
from malleable.lightning_modules.functional.precision import full, full_precision
from malleable.lightning_modules.serialization import SerializableModule

# Separates these random numbers from others that have the same seed and ids.
_PURPOSE = int.from_bytes(b"entities") >> 1


class Positives(NamedTuple):
    """True tails of a batch of queries.

    Attributes:
        target: ``(P,)`` ids of the true tails.
        row: ``(P,)`` index of the query of each true tail, in ``0..B-1``.
        num_rows: B, number of queries; queries without a true tail do not contribute to the loss.
        real: ``(B,)`` bool, False for padding queries, which do not count; ``None``: all queries count.
        one_each: Whether each query has exactly one true tail, in order, so that ``row`` is ``0..B-1``.
        sample_id: ``(B,)`` ids of the queries, for losses that sample; ``None``: the indices ``0..B-1``.
        seed: Seed of losses that sample; equal in all batches of an optimizer step, on all ranks.
    """

    target: Tensor
    row: Tensor
    num_rows: int
    real: Tensor | None = None
    one_each: bool = False
    sample_id: Tensor | None = None
    seed: Tensor | int = 0

    @property
    def counts(self) -> Tensor:
        """Number of true tails of each query, 0 for padding, ``(B,)`` float32."""
        if self.one_each and self.real is not None:
            return self.real.float()
        ones = torch.ones_like(self.row, dtype=torch.float32)
        # `bincount` would synchronise, because it reads the largest number from the device.
        counts = ones.new_zeros(self.num_rows).index_add_(0, self.row, ones)
        return counts if self.real is None else counts * self.real

    @property
    def weights(self) -> Tensor:
        """1 for each true tail of a real query, 0 for padding, ``(P,)`` float32."""
        return torch.ones_like(self.row, dtype=torch.float32) if self.real is None else self.real.float()[self.row]


class EmbeddingLoss(SerializableModule, ABC):
    """Base class of losses on queries with known true tails."""

    per_query: ClassVar[bool] = False
    """Whether the loss is a mean over queries instead of true tails."""
    samples: ClassVar[bool] = False
    """Whether only true tails and sampled entities are scored, so that the gradient of the entity table is sparse."""

    @abstractmethod
    def forward(self, query: Vectors, entity: nn.Embedding, key_of: KeyOf, positives: Positives, normaliser: Tensor | float) -> Tensor:
        """Compute the sum of the losses, divided by ``normaliser``.

        Args:
            query: Vectors ``(B, W)`` and biases ``(B,)`` of the queries.
            entity: Table of the entities.
            key_of: Maps rows of the table to key vectors and biases.
            positives: The true tails.
            normaliser: Number of true tails (of queries, if :attr:`per_query`) in the optimizer step.

        Returns:
            Scalar.
        """

    def weight(self, positives: Positives) -> Tensor:
        """Return the number of true tails (of queries, if :attr:`per_query`) that contribute to the loss, as a scalar tensor."""
        counts = positives.counts
        return (counts > 0).sum() if self.per_query else counts.sum()


class OneVsAll(EmbeddingLoss):
    """Base class of losses that score every entity.

    Args:
        smoothing: Label smoothing: share of the labels that is distributed uniformly over all entities, in [0, 1).
        chunk: Maximum number of entities scored at once, which bounds memory. Default: chosen for the device.

    Raises:
        ValueError: If an argument is out of range.
    """

    kind: ClassVar[Kind]

    def __init__(self, smoothing: float = 0.0, chunk: int | None = None) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        self.smoothing = smoothing
        self.chunk = chunk

    def forward(self, query: Vectors, entity: nn.Embedding, key_of: KeyOf, positives: Positives, normaliser: Tensor | float) -> Tensor:
        """Compute the loss over all entities, chunk by chunk."""
        counts = positives.counts
        return one_vs_all_loss(
            query,
            entity.weight,
            key_of,
            positives.target,
            positives.row,
            (counts > 0) if self.per_query else counts,
            kind=self.kind,
            smoothing=self.smoothing,
            normaliser=normaliser,
            chunk=self.chunk,
        )


class BCESum(OneVsAll):
    """Binary cross-entropy over all entities with one positive, the true tail t: ``sum_e softplus(s_e) - s_t`` for scores s.

    Other known tails are negatives. A query that is grouped with its m true tails counts m times, so that grouping does not change the loss.

    Args:
        smoothing: Label smoothing: share of the labels that is distributed uniformly over all entities, in [0, 1).
        chunk: Maximum number of entities scored at once.

    Source:
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764, code of the authors.
    """

    kind = "sigmoid"


class Softmax(OneVsAll):
    """Cross-entropy of the true tail among all entities: ``logsumexp(s) - s_t``.

    Args:
        smoothing: Label smoothing: share of the labels that is distributed uniformly over all entities, in [0, 1).
        chunk: Maximum number of entities scored at once.

    Source:
        Lacroix, Usunier, Obozinski (2018), Canonical Tensor Decomposition for Knowledge Base Completion, arXiv:1806.07297, Eq. 5.
    """

    kind = "softmax"


class KvsAll(OneVsAll):
    """Binary cross-entropy over all entities with all true tails of a query as positives; a mean over queries.

    Each query must be given once, with all its true tails.

    Args:
        smoothing: Label smoothing: share of the labels that is distributed uniformly over all entities, in [0, 1).
        chunk: Maximum number of entities scored at once.

    Source:
        Dettmers et al. (2018), Convolutional 2D Knowledge Graph Embeddings, arXiv:1707.01476, section 4.1.
        Differs: the sum over entities instead of the mean.
    """

    kind = "sigmoid"
    per_query = True


class NegativeSampling(EmbeddingLoss):
    """Binary cross-entropy of the true tail and uniformly sampled entities: ``softplus(-s_t) + sum_k w_k softplus(s_k)``.

    The entities sampled for a true tail depend only on the seed, the optimizer step, the query and the tail, not on ranks and batches.

    Args:
        num_negatives: K, number of sampled entities.
        temperature: Temperature of self-adversarial weights ``w = softmax(temperature s)``, which have no gradient; 0: all weights ``1 / K``.
        shared: Sample one set of entities for all queries of an optimizer step, which are then scored by one matrix product.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 5 and 6.
        Differs: the sum instead of the mean of the two parts; a sampled entity that is the true tail is left out.
    """

    samples = True

    def __init__(self, num_negatives: int = 64, temperature: float = 0.0, shared: bool = False) -> None:
        super().__init__()
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be >= 1, got {num_negatives}")
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.shared = shared

    @full_precision
    def forward(self, query: Vectors, entity: nn.Embedding, key_of: KeyOf, positives: Positives, normaliser: Tensor | float) -> Tensor:
        """Compute the loss of true tails and sampled entities."""
        target, row = positives.target, positives.row
        drawn = self.draw(positives, entity.num_embeddings)
        own = query.full().rows(row)
        keys = key_of(full(entity(torch.cat([target, drawn.flatten()]))))
        truth = score_pairs(own, keys.rows(slice(0, len(target))))
        rest = keys.rows(slice(len(target), None))
        scores = (
            own.vector @ rest.vector.T if self.shared else torch.einsum("pw,pkw->pk", own.vector, rest.vector.view(*drawn.shape, own.vector.shape[1]))
        )
        for bias in (None if own.bias is None else own.bias[:, None], None if rest.bias is None else rest.bias.reshape(drawn.shape)):
            scores = scores if bias is None else scores + bias
        real = drawn != target[:, None]
        scores = scores.masked_fill(~real, -torch.inf)
        weight = (self.temperature * scores).softmax(1).detach() if self.temperature else real / real.sum(1, keepdim=True).clamp_min(1)
        # The weights are nan if all sampled entities are the true tail.
        parts = F.softplus(-truth) + (weight.nan_to_num() * F.softplus(scores)).sum(1)
        return parts @ positives.weights.to(parts.dtype) / normaliser

    def draw(self, positives: Positives, num_entities: int) -> Tensor:
        """Sample entities, ``(P, K)`` int64, or ``(1, K)`` if :attr:`shared`."""
        target = positives.target
        if self.shared:
            seeds = target.new_zeros(1)
        else:
            ids = torch.arange(positives.num_rows, device=target.device) if positives.sample_id is None else positives.sample_id
            seeds = mix(mix(ids)[positives.row] + target)
        counter = torch.arange(self.num_negatives, device=target.device)
        return keyed_integers((seeds + (positives.seed + _PURPOSE))[:, None], counter, num_entities)


class Regulariser(SerializableModule, ABC):
    """Base class of penalties on the embeddings of the triples of a batch, added to the loss as a mean over true tails.

    Args:
        weight: Factor, >= 0.

    Raises:
        ValueError: If ``weight`` < 0.
    """

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        self.weight = weight

    @abstractmethod
    def forward(self, rows: tuple[Tensor, Tensor, Tensor], query: Vectors, key: Vectors) -> Tensor:
        """Compute the penalty of each true tail.

        Args:
            rows: Absolute values (moduli) of the rows of heads, relations and tails, ``(P, ...)`` each.
            query: Vectors of the queries, ``(P, W)``.
            key: Vectors of the true tails, ``(P, W)``.

        Returns:
            ``(P,)``.
        """


class NormRegulariser(Regulariser):
    """Base class of penalties on powers of the absolute values of heads, relations and tails."""

    power: ClassVar[int]

    def forward(self, rows: tuple[Tensor, Tensor, Tensor], query: Vectors, key: Vectors) -> Tensor:
        """Return ``weight / 3 sum |.|^p``, ``(P,)``."""
        return self.weight / 3 * torch.stack([row.pow(self.power).sum(-1) for row in rows]).sum(0)


class F2(NormRegulariser):
    """Squared Frobenius norm, ``weight / 3 (|h|^2 + |r|^2 + |t|^2)``.

    Args:
        weight: Factor, >= 0.

    Source:
        Lacroix, Usunier, Obozinski (2018), arXiv:1806.07297, section 4.2, with exponent 2.
    """

    power = 2


class N3(NormRegulariser):
    """Nuclear 3-norm, ``weight / 3 (|h|_3^3 + |r|_3^3 + |t|_3^3)``, with moduli of complex coordinates.

    Args:
        weight: Factor, >= 0.

    Source:
        Lacroix, Usunier, Obozinski (2018), arXiv:1806.07297, section 4.2.
    """

    power = 3


class DURA(Regulariser):
    """Duality-induced regulariser, ``weight (|q|^2 + |k|^2)`` for the vectors of query and true tail.

    Args:
        weight: Factor, >= 0.

    Source:
        Zhang, Cai, Wang (2020), Duality-Induced Regularizer for Tensor Factorization Based Knowledge Graph Completion, arXiv:2011.05816, Eq. 6.
        Differs: the dual part results from the reciprocal query, which has its own relation.
    """

    def forward(self, rows: tuple[Tensor, Tensor, Tensor], query: Vectors, key: Vectors) -> Tensor:
        """Return ``weight (|q|^2 + |k|^2)``, ``(P,)``."""
        return self.weight * (query.vector.square().sum(-1) + key.vector.square().sum(-1))
