"""Items that may be recommended, and metrics of recommended lists."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import AnswerBatch, Catalog, Recommendations
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics


def allowed_items(batch: AnswerBatch, num_items: int, exclude_seen: bool = True, *, exclude_target: bool = False) -> Tensor | None:
    """Return which items may be recommended.

    Args:
        batch: Rows; their candidates restrict the choice, and what they have seen is left out.
        num_items: Size of the catalogue, N.
        exclude_seen: Leave out what the user already has.
        exclude_target: Leave out the true item.

    Returns:
        ``(B, N)`` bool, or ``None`` where all may be.
    """
    hide = exclude_seen and batch.seen.shape[1] > 0
    if batch.candidates is None and not hide and not exclude_target:
        return None
    # One more column takes the padding.
    allowed = torch.full((len(batch), num_items + 1), batch.candidates is None, device=batch.sample_id.device)
    if batch.candidates is not None:
        allowed.scatter_(1, batch.candidates.where(batch.candidates >= 0, num_items), True)
    if hide:
        allowed.scatter_(1, batch.seen.where(batch.seen >= 0, num_items), False)
    if exclude_target:
        allowed.scatter_(1, batch.target[:, None].where(batch.target[:, None] >= 0, num_items), False)
    return allowed[:, :num_items]


def recommendation_metrics(catalog: Catalog, ks: tuple[int, ...]) -> dict[str, Metric]:
    """Make the metrics of recommended lists: accuracy, and exposure at cut-offs above 1 if there are any."""
    wide = tuple(k for k in ks if k > 1) or ks
    return {
        "ranking": RankingMetrics(ks),
        "exposure": ExposureMetrics(len(catalog), wide, genres=catalog.genres, popularity=catalog.popularity),
    }


def recommendation_headline(ks: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the main metrics of recommended lists, at cut-off 10 or, if that is not among them, the largest one."""
    k = 10 if 10 in ks else max(ks)
    return tuple(f"{name}_{k}" for name in ("hr", "ndcg", "mrr", "div_ratio", "or_ratio", "mgu", "dgu", "coverage"))


def update_metrics(metrics: dict[str, Metric], recommended: Recommendations, batch: AnswerBatch) -> None:
    """Feed metrics of recommended lists; others are left alone."""
    for metric in metrics.values():
        if isinstance(metric, RankingMetrics):
            metric.update(recommended.item_ids, batch.target, batch.sample_id)
        elif isinstance(metric, ExposureMetrics):
            metric.update(recommended.item_ids, batch.history if batch.metric_history is None else batch.metric_history, batch.sample_id)
