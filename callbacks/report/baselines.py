"""Evaluation of baselines on the test rows of a recommender, for the report."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Sequence
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import Metric

from malleable.callbacks.report.page import Column
from malleable.callbacks.report.trained_baseline import train_baseline
from malleable.datamodules.batch import RankedRows
from malleable.datamodules.files.escape import brief_repr
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics
from malleable.lightning_modules.recommendation.baselines import Baseline, ItemKNN, Markov, Popularity, count_rows
from malleable.lightning_modules.recommendation.counted_rows import training_rows
from malleable.lightning_modules.recommendation.ease import EASE
from malleable.lightning_modules.recommendation.evaluation import recommendation_metrics, update_metrics
from malleable.lightning_modules.recommendation.sequential import SequentialRecommender

log = logging.getLogger(__name__)


class Baselines(Callback):
    """Evaluate baselines in every test, on the rows and with the metrics of the tested module.

    Counting baselines are counted once, on the training rows of the data module. A
    :class:`~malleable.lightning_modules.recommendation.sequential.SequentialRecommender` is trained before the first test, for a fixed number of
    epochs. Baselines are not stored in checkpoints.
    :class:`~malleable.callbacks.report.report.RunReport` shows their metrics in columns next to the tested module, and stores them in
    ``metrics.json``, e.g. as ``baseline_popularity_hr_10``.

    Args:
        baselines: Baselines with their settings. Their catalogue is that of the data module. In a configuration, each element is a class name, or
            ``class_path`` and ``init_args``. Default: :class:`Popularity`, :class:`ItemKNN`, :class:`Markov` and :class:`EASE`; only
            :class:`Popularity` for a catalogue that is too large for their tables.
        epochs: Number of training epochs of each ``SequentialRecommender``.

    Raises:
        TypeError: If an element is not a baseline.
        ValueError: If ``epochs`` is < 1.
    """

    def __init__(self, baselines: Sequence[Baseline | SequentialRecommender] | None = None, epochs: int = 10) -> None:
        given = (Popularity(), ItemKNN(), Markov(), EASE()) if baselines is None else tuple(baselines)
        wrong = [baseline for baseline in given if not isinstance(baseline, (Baseline, SequentialRecommender))]
        if wrong:
            raise TypeError(
                "baselines must be instances of Baseline or SequentialRecommender, such as [Popularity(), ItemKNN(last=5)], got "
                f"{brief_repr(wrong[0])}"
            )
        if fixed := next((part for part in given if isinstance(part, SequentialRecommender) and (part.optimizer or part.lr_scheduler)), None):
            raise ValueError(f"a {type(fixed).__name__} in baselines is trained with its `tuning`; omit optimizer and lr_scheduler")
        if epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {epochs}")
        self.epochs = epochs
        self._by_default = baselines is None
        self._unused: set[str] = set()
        names = [_name(baseline) for baseline in given]
        keys = [baseline.encoder.kind if isinstance(baseline, SequentialRecommender) else _snake_case(type(baseline).__name__) for baseline in given]
        self.baselines = dict(zip(_numbered(keys, "_{}"), given, strict=True))
        self._titles = _numbered(names, " ({})")
        self.values: dict[str, dict[str, float]] = {}
        self._modules: dict[str, Baseline | SequentialRecommender] = {}
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._rows: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a data module with a catalogue, and that the tables of the baselines fit into memory.

        Raises:
            MisconfigurationException: If there is none, or if a baseline of the argument ``baselines`` does not support so many items.
        """
        source = getattr(trainer, "datamodule", None)
        if not hasattr(source, "catalog"):
            raise MisconfigurationException(
                f"Baselines counts the training rows of a data module with a `catalog`, got {type(source).__name__}; "
                "pass `datamodule=...` or remove Baselines"
            )
        catalog = getattr(source, "catalog", None)
        self._unused = set() if catalog is None else self._too_large(len(catalog))
        for baseline in self.baselines.values():
            timed = isinstance(baseline, SequentialRecommender) and baseline.encoder.kind == "hstu" and baseline.encoder.time_buckets > 0
            if timed and "sequence" not in getattr(source, "train_view", ""):
                raise MisconfigurationException(
                    "Baselines: encoder.kind 'hstu' reads times, which rows of prompts do not have; set encoder.time_buckets to 0, or choose sasrec"
                )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the training rows or train on them, unless this was done before, and make new metrics."""
        source = trainer.datamodule  # type: ignore[attr-defined]
        rows = training_rows(source)
        if rows is not self._rows:
            # Copy the modules: their tables have the size of this catalogue, and one of them may be the tested module.
            self._modules = {name: copy.deepcopy(baseline).eval() for name, baseline in self.baselines.items() if name not in self._unused}
            for module in self._modules.values():
                module.catalog = source.catalog
                if isinstance(module, SequentialRecommender):
                    module.behaviors = getattr(source, "behaviors", None)
            count_rows([module for module in self._modules.values() if isinstance(module, Baseline)], rows)
            for module in self._modules.values():
                if isinstance(module, SequentialRecommender):
                    train_baseline(module, source, self.epochs, int(os.environ.get("PL_GLOBAL_SEED", 0)), pl_module.device)
            self._rows = rows
        for name, module in self._modules.items():
            module.to(pl_module.device)
            self._metrics[name] = {key: metric.to(pl_module.device) for key, metric in _metrics(pl_module, source).items()}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the baselines on the batch.

        Raises:
            MisconfigurationException: If the rows of a batch have no history and no target.
        """
        if not isinstance(batch, RankedRows):
            raise MisconfigurationException(f"Baselines needs test rows with a history and a target, got {type(batch).__name__}; remove Baselines")
        for name, module in self._modules.items():
            metrics = self._metrics[name]
            update_metrics(metrics, module.recommend(batch, _width(metrics)), batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the metrics over all processes."""
        self.values = {
            name: {key: float(value) for metric in metrics.values() for key, value in metric.compute().items()}
            for name, metrics in self._metrics.items()
        }

    def _too_large(self, num_items: int) -> set[str]:
        """Return the names of the default baselines whose tables are too large for a catalogue; other baselines raise an error."""
        names = {name for name, baseline in self.baselines.items() if isinstance(baseline, Baseline) and not baseline.supports(num_items)}
        if names and not self._by_default:
            cast("Baseline", self.baselines[min(names)]).check_size(num_items)
        if names:
            log.warning("Baselines: %s are not measured, because their tables are too large for %d items", ", ".join(sorted(names)), num_items)
        return names

    def report_columns(self) -> list[Column]:
        """Return the metrics of the baselines in the last test."""
        titles = dict(zip(self.baselines, self._titles, strict=True))
        return [Column(titles[name], f"baseline_{name}", values) for name, values in self.values.items()]


def _name(baseline: Baseline | SequentialRecommender) -> str:
    """Return the name of a baseline: that of its class, or that of the method of an encoder."""
    if isinstance(baseline, SequentialRecommender):
        return {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "bert4rec": "BERT4Rec", "hstu": "HSTU"}[baseline.encoder.kind]
    return type(baseline).__name__


def _snake_case(name: str) -> str:
    """Convert a class name to snake case, e.g. ``ItemKNN`` to ``item_knn``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _numbered(names: Sequence[str], suffix: str) -> list[str]:
    """Append a number to the second and later occurrences of a name."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else name + suffix.format(count) for name, count in zip(names, counts, strict=True)]


def _metrics(module: LightningModule, source: Any) -> dict[str, Metric]:
    """Return new metrics of recommended lists: those of the tested module, or metrics at 1, 5 and 10 if it has none."""
    configure = getattr(module, "configure_metrics", dict)
    own: dict[str, Metric] = {name: metric for name, metric in configure().items() if isinstance(metric, RankingMetrics | ExposureMetrics)}
    return own or recommendation_metrics(source.catalog, (1, 5, 10))


def _width(metrics: dict[str, Metric]) -> int:
    return max(max(metric.ks) for metric in metrics.values() if isinstance(metric, RankingMetrics | ExposureMetrics))
