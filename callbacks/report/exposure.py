"""Exposure of items in the recommendations of a test, for the report."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from malleable.callbacks.report.page import Section
from malleable.callbacks.report.plots import draw_exposure, draw_exposure_curve
from malleable.datamodules.batch import Catalog, RankedRows, Recommendations
from malleable.lightning_modules.functional.ranks import gather_over_ranks
from malleable.lightning_modules.metrics.exposure import ExposureMetrics

TOP = 12


class ExposureReport(Callback):
    """Count the recommendations of each item in a test, and add them to the report.

    Modules are ignored unless their ``test_step`` returns :class:`~malleable.datamodules.batch.Recommendations` for an
    :class:`~malleable.datamodules.batch.RankedRows`.

    Args:
        k: Number of items of each list that are counted; default: all.
    """

    def __init__(self, k: int | None = None) -> None:
        if k is not None and k < 1:
            raise ValueError(f"k must be >= 1 or null, got {k}")
        self.k = k
        self.catalog: Catalog | None = None
        self.recommended: Tensor | None = None
        self._metric: ExposureMetrics | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
        self.catalog = getattr(pl_module, "catalog", None) or getattr(getattr(trainer, "datamodule", None), "catalog", None)
        self._metric = self.recommended = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the recommendations of a batch."""
        if self.catalog is None or not isinstance(outputs, Recommendations) or not isinstance(batch, RankedRows):
            return
        if self._metric is None:
            self._metric = self._make_metric(self.k or outputs.item_ids.shape[1], pl_module.device)
        history = batch.history if batch.metric_history is None else batch.metric_history
        self._metric.update(outputs.item_ids, history, batch.sample_id)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the counts over all processes, including those without a batch."""
        width = max(gather_over_ranks(0 if self._metric is None else self._metric.ks[0]))
        if not width:
            return
        metric = self._metric or self._make_metric(width, pl_module.device)
        metric.compute()
        self.recommended = metric.item_counts(width)

    def _make_metric(self, k: int, device: torch.device) -> ExposureMetrics:
        assert self.catalog is not None
        return ExposureMetrics(len(self.catalog), ks=(k,)).to(device)

    def report_sections(self) -> list[Section]:
        """Return sections with the most recommended titles and the concentration of exposure."""
        if self.recommended is None or self.catalog is None:
            return []
        catalog, versions = self.catalog, {"recommended": self.recommended}
        if catalog.popularity:
            versions["training interactions"] = torch.tensor(catalog.popularity)
        return [
            Section(
                "Most recommended titles",
                text=f"{int((self.recommended > 0).sum())} of {len(catalog)} titles are recommended at least once.",
                table=_table(self.recommended, catalog),
                figure=lambda figure: draw_exposure(figure.subplots(), versions, catalog.titles, TOP, catalog.keys),
                figure_size=(9.0, 5.0),
            ),
            Section("Concentration of exposure", figure=lambda figure: draw_exposure_curve(figure.subplots(), versions)),
        ]


def _table(counts: Tensor, catalog: Catalog) -> tuple[list[str], list[list[Any]]]:
    best = [item for item in counts.argsort(descending=True, stable=True)[:TOP].tolist() if counts[item]]
    rows: list[list[Any]] = [[catalog.titles[item], int(counts[item]), f"{100 * counts[item] / counts.sum():.2f} %"] for item in best]
    header = ["title", "recommended", "share"]
    if catalog.popularity:
        total = sum(catalog.popularity)
        header.append("share of training interactions")
        for row, item in zip(rows, best, strict=True):
            row.append(f"{100 * catalog.popularity[item] / total:.2f} %")
    return header, rows
