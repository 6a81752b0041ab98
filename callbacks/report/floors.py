"""What counting alone achieves on the same test rows: the floor beside every result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from malleable.callbacks.report.page import Column
from malleable.datamodules.batch import AnswerBatch
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics
from malleable.lightning_modules.recommendation.baselines import Baseline, ItemKNN, Markov, Popularity, learn, training_rows
from malleable.lightning_modules.recommendation.evaluation import recommendation_metrics, update_metrics

KINDS: dict[str, type[Baseline]] = {"popularity": Popularity, "item_knn": ItemKNN, "markov": Markov}


class Floors(Callback):
    """Measure popularity, item neighbours and next-item counts in every test, with the tested module's own metrics.

    They count the data module's training rows once, whatever the model was trained on, and are reported by
    :class:`~malleable.callbacks.report.report.RunReport` as ``floor_popularity_hr_10`` and so on.

    Args:
        baselines: Which of ``popularity``, ``item_knn`` and ``markov``.
        exclude_seen: Leave out what the user already has, as the tested module should.

    Raises:
        ValueError: If a baseline is unknown.
    """

    def __init__(self, baselines: Sequence[str] = tuple(KINDS), exclude_seen: bool = True) -> None:
        unknown = set(baselines) - set(KINDS)
        if unknown:
            raise ValueError(f"baselines must be among {sorted(KINDS)}, got {sorted(unknown)}")
        self.baselines = tuple(baselines)
        self.exclude_seen = exclude_seen
        self.values: dict[str, dict[str, float]] = {}
        self._modules: dict[str, Baseline] = {}
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._rows: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run without the data to count, before it starts."""
        source = getattr(trainer, "datamodule", None)
        if not hasattr(source, "catalog"):
            raise MisconfigurationException(
                f"Floors counts the training rows of a data module with a `catalog`, got {type(source).__name__}; "
                "pass `datamodule=...` or leave Floors out"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the training rows, unless they are counted already, and make fresh metrics."""
        source = trainer.datamodule  # type: ignore[attr-defined]
        rows = training_rows(source)
        if rows is not self._rows:
            self._modules = {name: KINDS[name](catalog=source.catalog, exclude_seen=self.exclude_seen) for name in self.baselines}
            learn(list(self._modules.values()), rows)
            self._rows = rows
        for name, module in self._modules.items():
            module.to(pl_module.device)
            self._metrics[name] = {key: metric.to(pl_module.device) for key, metric in _metrics(pl_module, source).items()}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Recommend for the same rows."""
        if not isinstance(batch, AnswerBatch):
            raise MisconfigurationException(f"Floors needs test rows with a history and a target, got {type(batch).__name__}; leave Floors out")
        for name, module in self._modules.items():
            metrics = self._metrics[name]
            update_metrics(metrics, module.recommend(batch, _width(metrics)), batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the metrics over all processes."""
        self.values = {
            name: {key: float(value) for metric in metrics.values() for key, value in metric.compute().items()}
            for name, metrics in self._metrics.items()
        }

    def report_columns(self) -> list[Column]:
        """Return the floors of the last test."""
        return [Column(type(self._modules[name]).__name__, f"floor_{name}", values) for name, values in self.values.items()]


def _metrics(module: LightningModule, source: Any) -> dict[str, Metric]:
    """The tested module's metrics of recommended lists, anew; the usual ones where it has none."""
    configure = getattr(module, "configure_metrics", dict)
    own: dict[str, Metric] = {name: metric for name, metric in configure().items() if isinstance(metric, RankingMetrics | ExposureMetrics)}
    return own or recommendation_metrics(source.catalog, (1, 5, 10))


def _width(metrics: dict[str, Metric]) -> int:
    return max(max(metric.ks) for metric in metrics.values() if isinstance(metric, RankingMetrics | ExposureMetrics))
