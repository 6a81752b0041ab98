"""Ranking metrics.

:class:`RankingMetrics` is for recommended lists with one true item, :class:`ScoredRankingMetrics` for scored candidates with graded labels. Their
states are integer sums, so that the figures do not depend on the order of rows or the number of devices.

Shapes: B rows, K recommended items, C candidates. Ranks start at 1. Rows with a negative ``sample_id`` are padding and are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.lightning_modules.metrics.row_ranks import RowRanks

Ties = Literal["optimistic", "realistic", "pessimistic"]
Gain = Literal["linear", "exp"]
TIE_WEIGHTS: dict[str, float] = {"optimistic": 0.0, "realistic": 0.5, "pessimistic": 1.0}
RESOLUTION = 2.0**32  # values are summed as integers in units of 1 / RESOLUTION, because sums of floats depend on the order


def rank_of_target(scores: Tensor, target: Tensor, ties: Ties = "realistic") -> Tensor:
    """Compute the rank of one item among all: ``1 + #greater + weight * #ties``.

    Args:
        scores: ``(B, C)``; ``-inf`` for items that may not be recommended; ``nan`` counts as ``-inf``.
        target: ``(B,)`` column of the true item.
        ties: Rank of the target among items of equal score; the weight is 0 (``optimistic``), 1/2 (``realistic``) or 1 (``pessimistic``).

    Returns:
        ``(B,)`` float64; fractional with ``realistic``.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    own = scores.gather(1, target[:, None])
    greater = (scores > own).sum(1)
    equal = (scores == own).sum(1) - 1
    return 1 + greater + tie_weight(ties) * equal.double()


def rank_in_list(recommended: Tensor, target: Tensor) -> Tensor:
    """Return the rank of the true item in a recommended list, ``inf`` if it is not in the list.

    Args:
        recommended: ``(B, K)`` item ids, best first, padded with -1.
        target: ``(B,)``; -1 if the true item is not in the catalogue, so that it is never found.

    Returns:
        ``(B,)`` float64.
    """
    hits = (recommended == target[:, None]) & (target >= 0)[:, None]
    first = hits.int().argmax(1).double() + 1 if recommended.shape[1] else torch.ones_like(target, dtype=torch.double)
    return torch.where(hits.any(1), first, torch.inf)


def item_ranks(scores: Tensor, labels: Tensor, mask: Tensor | None = None, ties: Ties = "realistic") -> Tensor:
    """Compute the rank of every candidate.

    Among equal scores, candidates with higher labels come first (``optimistic``) or last (``pessimistic``); ``realistic`` is the mean of both ranks.

    Args:
        scores: ``(B, C)``; ``nan`` counts as ``-inf``.
        labels: ``(B, C)`` relevance, 0 is irrelevant.
        mask: ``(B, C)`` bool, True on real candidates.
        ties: Policy for equal scores.

    Returns:
        ``(B, C)`` float64, ``inf`` where masked.
    """
    weight = tie_weight(ties)
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    # `sort` puts nan last, so that masked candidates come after real ones of any score.
    keys = torch.where(scores.isnan(), torch.inf, -scores).masked_fill(~real, torch.nan)
    ranks = _ranks(keys, labels, descending=weight < 1)
    if weight == 0.5 and _has_ties(keys):
        ranks = (ranks + _ranks(keys, labels, descending=False)) / 2
    return ranks.masked_fill(~real, torch.inf)


def hit_rate(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return 1 if a relevant candidate is among the first ``k``, else 0; ranks and labels are ``(B, C)``, the result ``(B,)``."""
    return _hits(ranks, labels, k).any(1).double()


def precision(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Divide the number of relevant candidates among the first ``k`` by ``k``; ranks and labels are ``(B, C)``, the result ``(B,)``."""
    return _hits(ranks, labels, k).sum(1).double() / k


def recall(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Divide the number of relevant candidates among the first ``k`` by the number of all relevant ones; ``(B, C)`` to ``(B,)``."""
    return _hits(ranks, labels, k).sum(1).double() / (labels > 0).sum(1).clamp_min(1)


def capped_recall(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Divide the number of relevant candidates among the first ``k`` by its maximum, ``min(k, relevant)``; ``(B, C)`` to ``(B,)``."""
    return _hits(ranks, labels, k).sum(1).double() / (labels > 0).sum(1).clamp(1, k)


def reciprocal_rank(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the reciprocal of the rank of the first relevant candidate, 0 if it exceeds ``k``; ``(B, C)`` to ``(B,)``."""
    return ranks.masked_fill(~_hits(ranks, labels, k), torch.inf).amin(1).reciprocal()


def ndcg(ranks: Tensor, labels: Tensor, k: int, gain: Gain = "linear") -> Tensor:
    """Compute the discounted cumulative gain of the first ``k``, divided by that of the ideal order.

    Args:
        ranks: ``(B, C)``.
        labels: ``(B, C)`` graded relevance >= 0.
        k: Cut-off.
        gain: ``linear``: the label; ``exp``: ``2 ** label - 1``.

    Returns:
        ``(B,)``.
    """
    gains = labels.double() if gain == "linear" else torch.exp2(labels.double()) - 1
    gains = gains.masked_fill(ranks.isinf(), 0.0)
    reached = gains.masked_fill(ranks > k, 0.0) / torch.log2(ranks + 1)
    best = gains.topk(min(k, gains.shape[1]), dim=1).values
    ideal = (best / torch.log2(torch.arange(2, best.shape[1] + 2, device=best.device))).sum(1)
    return reached.sum(1) / ideal.clamp_min(torch.finfo(torch.double).tiny)


def average_precision(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum the precision at each relevant candidate among the first ``k``, divided by ``min(k, relevant)``; ``(B, C)`` to ``(B,)``.

    A perfect list of length ``k`` therefore has the value 1. Libraries that divide by the number of relevant candidates (trec_eval, ranx) give
    smaller values if more than ``k`` are relevant.
    """
    found = ranks.masked_fill(~_hits(ranks, labels, k), torch.inf).sort(1).values
    number = torch.arange(1, found.shape[1] + 1, device=found.device)
    return (number / found).sum(1) / (labels > 0).sum(1).clamp(1, k)


class RankingMetrics(Metric):
    """HR, nDCG and MRR of recommended lists with one true item for each row.

    The state is a histogram of the rank of the true item. If ``row_ranks`` is set, the ranks of all rows are also collected there.

    Args:
        ks: Cut-offs k. The results have the keys ``hr_<k>``, ``ndcg_<k>`` and ``mrr_<k>``.

    Source:
        Gao et al. (2025), arXiv:2412.09243, and the evaluation code of the authors: one relevant item, whose ideal gain is 1; rows whose true item is
        not in the catalogue count as misses.
    """

    full_state_update = False
    higher_is_better = True
    rank_counts: Tensor
    rows: Tensor
    row_ranks: RowRanks | None = None

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.ks = check_ks(ks)
        self.add_state("rank_counts", torch.zeros(self.ks[-1], dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self._computed_ranks: tuple[Tensor, Tensor] | None = None

    def update(self, recommended: Tensor, target: Tensor, sample_id: Tensor) -> None:
        """Add rows.

        Args:
            recommended: ``(B, K)`` item ids, best first, padded with -1, K at least the largest cut-off.
            target: ``(B,)`` true item, -1 if it is not in the catalogue.
            sample_id: ``(B,)`` ids; rows with a negative id are skipped.
        """
        check_width(recommended, self.ks[-1])
        real = sample_id >= 0
        ranks = rank_in_list(recommended[:, : self.ks[-1]], target)
        if self.row_ranks is not None:
            self.row_ranks.add(sample_id, target, ranks)
        ranks = ranks[real]
        # Not in place: a state that was reset in inference mode cannot be modified outside it.
        self.rank_counts = self.rank_counts + torch.bincount(ranks[ranks <= self.ks[-1]].long() - 1, minlength=self.ks[-1])
        self.rows = self.rows + real.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all rows of all processes; ``nan`` without rows."""
        counts, rows = self._computed_ranks = self.rank_counts.cpu().double(), self.rows.cpu().double()
        weights = _rank_weights(counts)
        return {f"{name}_{k}": ((weight * counts)[:k].sum() / rows).float().to(self.device) for k in self.ks for name, weight in weights.items()}

    def standard_errors(self) -> dict[str, float]:
        """Return the standard errors of the metrics over all rows of all processes, at the last call of :meth:`compute`; ``nan`` without rows.

        Raises:
            RuntimeError: If :meth:`compute` has not been called.
        """
        if self._computed_ranks is None:
            raise RuntimeError("standard_errors is available after compute(); call compute() first, on all processes")
        counts, rows = self._computed_ranks
        errors = {}
        for name, weight in _rank_weights(counts).items():
            for k in self.ks:
                mean, square = ((values * counts)[:k].sum() / rows for values in (weight, weight**2))
                errors[f"{name}_{k}"] = float(((square - mean**2).clamp_min(0) / rows).sqrt())
        return errors


class ScoredRankingMetrics(Metric):
    """HR, recall, precision, MRR, nDCG and MAP of scored candidates with graded labels.

    Args:
        ks: Cut-offs k. The results have the keys ``hr_<k>``, ``recall_<k>``, ``recall_cap_<k>``, ``precision_<k>``, ``mrr_<k>``, ``map_<k>`` and
            ``ndcg_<k>``.
        gain: Gain of a label in nDCG: ``linear`` or ``exp``.
        ties: Policy for equal scores, see :func:`item_ranks`.
        skip_empty: Leave out rows without a relevant candidate; otherwise they count as 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    rows: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5, 10), gain: Gain = "linear", ties: Ties = "realistic", skip_empty: bool = True) -> None:
        super().__init__()
        if gain not in ("linear", "exp"):
            raise ValueError(f"gain must be 'linear' or 'exp', got {gain!r}")
        tie_weight(ties)
        self.ks = check_ks(ks)
        self.gain: Gain = gain
        self.ties: Ties = ties
        self.skip_empty = skip_empty
        self.names = ("hr", "recall", "recall_cap", "precision", "mrr", "map", "ndcg")
        self.add_state("sums", torch.zeros(len(self.ks), len(self.names), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor, mask: Tensor, sample_id: Tensor) -> None:
        """Add rows.

        Args:
            scores: ``(B, C)``, higher is better.
            labels: ``(B, C)`` relevance >= 0.
            mask: ``(B, C)`` bool, True on real candidates.
            sample_id: ``(B,)`` ids; rows with a negative id are skipped.
        """
        labels = labels * mask
        keep = (sample_id >= 0) & ((labels > 0).any(1) if self.skip_empty else True)
        scores, labels, mask = scores[keep], labels[keep], mask[keep]
        ranks = item_ranks(scores, labels, mask, self.ties)
        values = torch.stack([torch.stack(self._values(ranks, labels, k)) for k in self.ks])
        self.sums = self.sums + (values * RESOLUTION).round().long().sum(-1)
        self.rows = self.rows + keep.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all rows of all processes; ``nan`` without rows."""
        means = (self.sums.cpu().double() / RESOLUTION / self.rows.cpu()).float().to(self.device)
        return {f"{name}_{k}": means[row, column] for row, k in enumerate(self.ks) for column, name in enumerate(self.names)}

    def _values(self, ranks: Tensor, labels: Tensor, k: int) -> list[Tensor]:
        functions = (hit_rate, recall, capped_recall, precision, reciprocal_rank, average_precision)
        return [*(function(ranks, labels, k) for function in functions), ndcg(ranks, labels, k, self.gain)]


def tie_weight(ties: Ties) -> float:
    """Return the share of tied items that are ranked before the target."""
    if ties not in TIE_WEIGHTS:
        raise ValueError(f"ties must be one of {sorted(TIE_WEIGHTS)}, got {ties!r}")
    return TIE_WEIGHTS[ties]


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """Return the cut-offs in ascending order."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be cut-offs >= 1, got {tuple(ks)}")
    return tuple(sorted(set(ks)))


def check_width(recommended: Tensor, k: int) -> None:
    """Check that lists are not shorter than the largest cut-off; missing items would count as misses."""
    if recommended.ndim != 2 or recommended.shape[1] < k:
        raise ValueError(f"recommended must be (B, K) with K >= {k}, got {tuple(recommended.shape)}; pad it to {k} columns with -1")


def _rank_weights(counts: Tensor) -> dict[str, Tensor]:
    """Return the value of each rank from 1 on, by metric, for counts of ranks ``(K,)``."""
    ranks = torch.arange(1, len(counts) + 1).double()
    return {"hr": torch.ones_like(ranks), "ndcg": 1 / torch.log2(ranks + 1), "mrr": 1 / ranks}


def _hits(ranks: Tensor, labels: Tensor, k: int) -> Tensor:
    return (labels > 0) & (ranks <= k)


def _ranks(keys: Tensor, labels: Tensor, descending: bool) -> Tensor:
    """Rank by ascending key, then by label; return ``(B, C)``."""
    by_label = labels.argsort(dim=1, descending=descending, stable=True)
    order = by_label.gather(1, keys.gather(1, by_label).argsort(dim=1, stable=True))
    numbers = torch.arange(1, keys.shape[1] + 1, device=keys.device, dtype=torch.double)
    return torch.empty_like(keys, dtype=torch.double).scatter_(1, order, numbers.expand_as(keys))


def _has_ties(keys: Tensor) -> bool:
    ordered = keys.sort(dim=1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
