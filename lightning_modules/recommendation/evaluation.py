"""Allowed items and metrics of recommended lists.

Shapes: B rows, N items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import Catalog, RankedRows, Recommendations
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics


def allowed_items(batch: RankedRows, num_items: int, exclude_seen: bool = True, *, exclude_target: bool = False) -> Tensor | None:
    """Return which items may be recommended.

    Args:
        batch: Rows; their candidates restrict the choice.
        num_items: Size of the catalogue, N.
        exclude_seen: Do not recommend items that the user has interacted with.
        exclude_target: Exclude the true item.

    Returns:
        ``(B, N)`` bool, or ``None`` if all items are allowed.
    """
    hide = exclude_seen and batch.seen.shape[1] > 0
    if batch.candidates is None and not hide and not exclude_target:
        return None
    # The additional last column receives the padding.
    allowed = torch.full((len(batch), num_items + 1), batch.candidates is None, device=batch.sample_id.device)
    if batch.candidates is not None:
        allowed.scatter_(1, batch.candidates.where(batch.candidates >= 0, num_items), True)
    if hide:
        allowed.scatter_(1, batch.seen.where(batch.seen >= 0, num_items), False)
    if exclude_target:
        allowed.scatter_(1, batch.target[:, None].where(batch.target[:, None] >= 0, num_items), False)
    return allowed[:, :num_items]


def recommendation_metrics(catalog: Catalog, ks: tuple[int, ...]) -> dict[str, Metric]:
    """Return the metrics of recommended lists: accuracy, and exposure at the cut-offs above 1, or at all if there are none above 1."""
    wide = tuple(k for k in ks if k > 1) or ks
    return {
        "ranking": RankingMetrics(ks),
        "exposure": ExposureMetrics(len(catalog), wide, genres=catalog.genres, popularity=catalog.popularity),
    }


def recommendation_headline(ks: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the main metrics of recommended lists, at cut-off 10 or, if that is not among them, the largest one."""
    k = 10 if 10 in ks else max(ks)
    return tuple(f"{name}_{k}" for name in ("hr", "ndcg", "mrr", "div_ratio", "or_ratio", "mgu", "dgu", "coverage"))


class ItemRanking(ABC):
    """Mixin of modules that recommend items of a catalogue: metrics and evaluation of the lists. It must precede ``BaseModule`` in the MRO."""

    catalog: Catalog | None
    ks: tuple[int, ...]

    @abstractmethod
    def recommend(self, batch: Any, k: int | None = None) -> Recommendations:
        """Find the k best items of each row; default of k: the largest cut-off of the metrics."""

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Main metrics of recommended lists."""
        return recommendation_headline(self.ks)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of accuracy and exposure of recommended lists."""
        assert self.catalog is not None
        return recommendation_metrics(self.catalog, self.ks)

    def evaluate(self, batch: Any, metrics: dict[str, Metric]) -> Recommendations:
        """Recommend items, and update the metrics."""
        recommended = self.recommend(batch)
        update_metrics(metrics, recommended, batch)
        return recommended


def update_metrics(metrics: dict[str, Metric], recommended: Recommendations, batch: RankedRows) -> None:
    """Update the metrics of recommended lists; other metrics are not changed."""
    for metric in metrics.values():
        if isinstance(metric, RankingMetrics):
            metric.update(recommended.item_ids, batch.target, batch.sample_id)
        elif isinstance(metric, ExposureMetrics):
            metric.update(recommended.item_ids, batch.history if batch.metric_history is None else batch.metric_history, batch.sample_id)
