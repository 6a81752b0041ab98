"""Losses of recommenders that score items by the inner product of a state and the embedding of an item.

Shapes: P positions, N items, d width, k negatives of a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from malleable.lightning_modules.functional.precision import full_precision
from malleable.lightning_modules.functional.recommendation.item_softmax import item_cross_entropy
from malleable.lightning_modules.serialization import SerializableModule

# Number of embedding entries of negatives in memory: 16 MB on a CPU, 256 MB on an accelerator.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}


class Negatives(NamedTuple):
    """Negatives of some positions.

    Attributes:
        items: ``(P, k)`` int64.
        log_expected: ``(P, k)`` float32, logarithm of the expected number of draws of each item, ``log(k q)``.
        earlier: ``(P, k)`` bool, negatives that are the target or an earlier item of the sequence.
        is_target: ``(P, k)`` bool, negatives that are the target.
    """

    items: Tensor
    log_expected: Tensor
    earlier: Tensor
    is_target: Tensor


class DrawNegatives(Protocol):
    """Function that draws negatives.

    Attributes:
        count: Number of negatives of a position, k.
    """

    count: int

    def __call__(self, rows: slice) -> Negatives:
        """Return the negatives of the positions of a slice; equal in every call."""


class ItemLoss(SerializableModule, ABC):
    """Base class of losses over items.

    A loss is a weighted sum over positions. A subclass without negatives overrides :meth:`forward`, one with negatives overrides :meth:`pairwise`.

    Attributes:
        num_negatives: Number of negatives of a position if no sampler is given; 0: the loss uses all items.
    """

    num_negatives: ClassVar[int] = 0

    def forward(self, states: Tensor, items: Tensor, target: Tensor, weight: Tensor, draw: DrawNegatives | None = None) -> Tensor:
        """Compute ``sum_p weight_p loss_p``.

        Args:
            states: ``(P, d)``.
            items: ``(N, d)`` embeddings of all items.
            target: ``(P,)`` int64 true items; any item where the weight is 0.
            weight: ``(P,)`` float32.
            draw: Draws the negatives of positions; required by losses with negatives.

        Returns:
            Scalar.
        """
        if draw is None:
            raise ValueError(f"{type(self).__name__} needs negatives")
        chunk = max(1, CHUNK.get(states.device.type, CHUNK["cuda"]) // (states.shape[1] * draw.count))
        parts = [slice(start, start + chunk) for start in range(0, len(states), chunk)]

        def part_of_sum(rows: slice, own: Tensor, table: Tensor) -> Tensor:
            return self._sum(own, table, target[rows], weight[rows], draw(rows))

        if len(parts) <= 1:
            return part_of_sum(slice(None), states, items)
        # Negatives are drawn again in the backward pass, so that their embeddings are not stored.
        totals = [checkpoint(part_of_sum, rows, states[rows], items, use_reentrant=False) for rows in parts]
        return torch.stack(totals).sum()

    @abstractmethod
    def pairwise(self, positive: Tensor, negative: Tensor, negatives: Negatives, num_items: int) -> Tensor:
        """Compute the loss of each position.

        Args:
            positive: ``(P,)`` scores of the true items.
            negative: ``(P, k)`` scores of the negatives.
            negatives: The negatives.
            num_items: N.

        Returns:
            ``(P,)``.
        """

    @full_precision
    def _sum(self, states: Tensor, items: Tensor, target: Tensor, weight: Tensor, negatives: Negatives) -> Tensor:
        states, items = states.float(), items.float()
        positive = (states * F.embedding(target, items)).sum(1)
        negative = torch.einsum("pd,pkd->pk", states, F.embedding(negatives.items, items))
        return (self.pairwise(positive, negative, negatives, len(items)) * weight).sum()


class CE(ItemLoss):
    """Cross-entropy over all items, computed in chunks of positions."""

    def forward(self, states: Tensor, items: Tensor, target: Tensor, weight: Tensor, draw: DrawNegatives | None = None) -> Tensor:
        """Compute ``sum_p weight_p (-s_p,target + log sum_j exp s_pj)``."""
        return item_cross_entropy(states, items, target, weight)

    def pairwise(self, positive: Tensor, negative: Tensor, negatives: Negatives, num_items: int) -> Tensor:
        """Not used: the loss has no negatives."""
        raise TypeError("CE has no negatives")


class SampledCE(ItemLoss):
    """Cross-entropy over the target and sampled items, corrected by the probability of the samples.

    ``-s_y + log(exp s_y + sum_j exp(s_j - log(k q_j)))``. Negatives that are the target are left out. Earlier items of the sequence are not,
    because the loss estimates the cross-entropy over all items.

    Source:
        Bengio and Senécal (2008), Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model.
    """

    num_negatives: ClassVar[int] = 256

    def pairwise(self, positive: Tensor, negative: Tensor, negatives: Negatives, num_items: int) -> Tensor:
        """Compute the loss of each position, ``(P,)``."""
        corrected = (negative - negatives.log_expected).masked_fill(negatives.is_target, -torch.inf)
        return torch.cat([positive[:, None], corrected], 1).logsumexp(1) - positive


class GBCE(ItemLoss):
    """Binary cross-entropy whose positive term is weighted for the number of negatives.

    ``-beta log sigmoid(s_y) - sum_j log(1 - sigmoid(s_j))``, ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)``, ``alpha = k / (N - 1)``. Negatives
    that are the target or an earlier item of the sequence are left out.

    Args:
        t: Calibration: 0 is binary cross-entropy, 1 gives scores that are calibrated for all items.

    Raises:
        ValueError: If ``t`` is not in [0, 1].

    Source:
        Petrov and Macdonald (2023), gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative Sampling, arXiv:2308.07192.
    """

    num_negatives: ClassVar[int] = 256

    def __init__(self, t: float = 0.75) -> None:
        super().__init__()
        if not 0 <= t <= 1:
            raise ValueError(f"t must be in [0, 1], got {t}")
        self.t = t

    def pairwise(self, positive: Tensor, negative: Tensor, negatives: Negatives, num_items: int) -> Tensor:
        """Compute the loss of each position, ``(P,)``."""
        alpha = negative.shape[1] / max(1, num_items - 1)
        beta = alpha * (self.t * (1 - 1 / alpha) + 1 / alpha)
        return beta * F.softplus(-positive) + F.softplus(negative).masked_fill(negatives.earlier, 0).sum(1)


class BCE(GBCE):
    """Binary cross-entropy of the target and of sampled items, whose terms are added.

    Negatives that are the target or an earlier item of the sequence are left out.

    Source:
        Kang and McAuley (2018), Self-Attentive Sequential Recommendation, arXiv:1808.09781, section III-E, with one negative.
    """

    num_negatives: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__(t=0.0)

    def as_plain(self) -> dict[str, object]:
        """Return the class path."""
        return {**super().as_plain(), "init_args": {}}


class BPR(ItemLoss):
    """Bayesian personalised ranking: mean over the negatives of ``-log sigmoid(s_y - s_j)``.

    Negatives that are the target or an earlier item of the sequence are left out.

    Source:
        Rendle et al. (2009), BPR: Bayesian Personalized Ranking from Implicit Feedback, arXiv:1205.2618.
    """

    num_negatives: ClassVar[int] = 1

    def pairwise(self, positive: Tensor, negative: Tensor, negatives: Negatives, num_items: int) -> Tensor:
        """Compute the loss of each position, ``(P,)``."""
        return F.softplus(negative - positive[:, None]).masked_fill(negatives.earlier, 0).mean(1)


def default_item_loss(num_items: int) -> ItemLoss:
    """Return the default loss: cross-entropy over all items up to 50,000 items, sampled above."""
    return CE() if num_items <= 50_000 else GBCE()
