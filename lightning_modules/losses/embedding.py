"""Losses and regularisers of knowledge-graph embeddings: small objects on queries, entities and true tails.

Shapes: B queries, E entities, P true tails, K negatives, W width of the product. Losses are means over true tails unless said otherwise, with
sums over entities: their size grows with the graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malleable.lightning_modules.functional.graphs.interaction import Vectors, score_pairs
from malleable.lightning_modules.functional.graphs.one_vs_all import KeyOf, Kind, one_vs_all_loss
from malleable.lightning_modules.functional.precision import full, full_precision
from malleable.lightning_modules.serialization import SerializableModule


class Positives(NamedTuple):
    """The true tails of a batch of queries.

    Attributes:
        target: ``(P,)`` entities.
        row: ``(P,)`` the query of each.
        num_rows: B; queries without a true tail bear no loss.
        real: ``(B,)`` bool, False for queries that are repeated only to fill a batch and count for nothing; ``None``: all count.
        one_each: Every query has one true tail, in order: ``row`` is ``0..B-1``.
    """

    target: Tensor
    row: Tensor
    num_rows: int
    real: Tensor | None = None
    one_each: bool = False

    @property
    def counts(self) -> Tensor:
        """True tails of each query that count, ``(B,)`` float32."""
        if self.one_each and self.real is not None:
            return self.real.float()
        ones = torch.ones_like(self.row, dtype=torch.float32)
        # Not `bincount`, which reads its largest number from the device.
        counts = ones.new_zeros(self.num_rows).index_add_(0, self.row, ones)
        return counts if self.real is None else counts * self.real

    @property
    def shares(self) -> Tensor:
        """1 for each true tail that counts, 0 for others, ``(P,)`` float32."""
        return torch.ones_like(self.row, dtype=torch.float32) if self.real is None else self.real.float()[self.row]


class EmbeddingLoss(SerializableModule, ABC):
    """A loss of queries whose true tails are known."""

    per_query: ClassVar[bool] = False
    """A mean over queries instead of true tails."""
    samples: ClassVar[bool] = False
    """Only the true tails and drawn entities are scored, so that gradients of the entity table are sparse."""

    @abstractmethod
    def forward(self, query: Vectors, entity: nn.Embedding, key_of: KeyOf, positives: Positives, normaliser: Tensor | float) -> Tensor:
        """Sum the losses and divide by the ``normaliser``.

        Args:
            query: ``(B, W)``.
            entity: Rows of the entities.
            key_of: Turns rows into the entities' side.
            positives: The true tails.
            normaliser: True tails (queries, if :attr:`per_query`) that the sum is a mean over.
        """

    def weight(self, positives: Positives) -> Tensor:
        """Number of true tails (queries, if :attr:`per_query`) that the loss is a mean over, a scalar on their device."""
        counts = positives.counts
        return (counts > 0).sum() if self.per_query else counts.sum()


class OneVsAll(EmbeddingLoss):
    """Every entity a candidate.

    Args:
        smoothing: Share of the label spread evenly over all entities, in [0, 1).
        chunk: Most entities scored at a time, which bounds memory; default: as many as the device holds well.

    Raises:
        ValueError: If an argument is out of its range.
    """

    kind: ClassVar[Kind]

    def __init__(self, smoothing: float = 0.0, chunk: int | None = None) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        self.smoothing = smoothing
        self.chunk = chunk

    def forward(self, query: Vectors, entity: nn.Embedding, key_of: KeyOf, positives: Positives, normaliser: Tensor | float) -> Tensor:
        """Sum over all entities, chunk by chunk."""
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
    """Binary cross-entropy against every entity, only the query's own tail positive: ``sum_e softplus(s_e) - s_t``.

    Other known tails count as negatives. Queries grouped with their m true tails count m times, which is the same loss.

    Args:
        smoothing: Share of the label spread evenly over all entities, in [0, 1).
        chunk: Most entities scored at a time.

    Source:
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764: the authors' code.
    """

    kind = "sigmoid"


class Softmax(OneVsAll):
    """Cross-entropy of the true tail among all entities: ``logsumexp(s) - s_t``.

    Args:
        smoothing: Share of the label spread evenly over all entities, in [0, 1).
        chunk: Most entities scored at a time.

    Source:
        Lacroix, Usunier, Obozinski (2018), Canonical Tensor Decomposition for Knowledge Base Completion, arXiv:1806.07297, Eq. 5.
    """

    kind = "softmax"


class KvsAll(OneVsAll):
    """Binary cross-entropy against every entity, all true tails of a query positive at once; the mean over queries.

    It takes queries with all their true tails (grouped ones).

    Args:
        smoothing: Share of the label spread evenly over all entities, in [0, 1).
        chunk: Most entities scored at a time.

    Source:
        Dettmers et al. (2018), Convolutional 2D Knowledge Graph Embeddings, arXiv:1707.01476, section 4.1.
        Differs: the sum over entities instead of the mean.
    """

    kind = "sigmoid"
    per_query = True


class NegativeSampling(EmbeddingLoss):
    """Binary cross-entropy of the true tail and of entities drawn evenly: ``softplus(-s_t) + sum_k w_k softplus(s_k)``.

    Args:
        num_negatives: K, entities drawn.
        temperature: Weights ``w = softmax(temperature s)`` without gradient (self-adversarial); 0: all ``1 / K``.
        shared: Draw one set for all queries of the batch, which is one product.

    Raises:
        ValueError: If an argument is out of its range.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 5 and 6.
        Differs: a sum, not the mean, of the true tail's and the drawn entities' parts; a drawn true tail is left out.
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
        """Score true tails and drawn entities."""
        target, row = positives.target, positives.row
        drawn = torch.randint(entity.num_embeddings, (1 if self.shared else len(target), self.num_negatives), device=target.device)
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
        # A row of true tails alone has no weights.
        parts = F.softplus(-truth) + (weight.nan_to_num() * F.softplus(scores)).sum(1)
        return parts @ positives.shares.to(parts.dtype) / normaliser


class Regulariser(SerializableModule, ABC):
    """A penalty on what the triples of a batch are made of, added to the loss as a mean over true tails.

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
        """Penalise.

        Args:
            rows: Moduli of the heads', relations' and tails' rows, ``(P, ...)`` each.
            query: The queries' side, ``(P, W)``.
            key: The true tails' side, ``(P, W)``.

        Returns:
            The penalty of each true tail, ``(P,)``.
        """


class NormRegulariser(Regulariser):
    """Powers of the moduli of all three rows."""

    power: ClassVar[int]

    def forward(self, rows: tuple[Tensor, Tensor, Tensor], query: Vectors, key: Vectors) -> Tensor:
        """``weight / 3 sum |.|^p``."""
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
    """Nuclear 3-norm, ``weight / 3 (|h|_3^3 + |r|_3^3 + |t|_3^3)``, of complex coordinates their moduli.

    Args:
        weight: Factor, >= 0.

    Source:
        Lacroix, Usunier, Obozinski (2018), arXiv:1806.07297, section 4.2.
    """

    power = 3


class DURA(Regulariser):
    """Duality-induced: ``weight (|q|^2 + |k|^2)`` of the query's and the true tail's vectors.

    Args:
        weight: Factor, >= 0.

    Source:
        Zhang, Cai, Wang (2020), Duality-Induced Regularizer for Tensor Factorization Based Knowledge Graph Completion, arXiv:2011.05816, Eq. 6.
        Differs: the dual half comes with the reciprocal query, which has a relation of its own.
    """

    def forward(self, rows: tuple[Tensor, Tensor, Tensor], query: Vectors, key: Vectors) -> Tensor:
        """Penalise both sides of the product."""
        return self.weight * (query.vector.square().sum(-1) + key.vector.square().sum(-1))
