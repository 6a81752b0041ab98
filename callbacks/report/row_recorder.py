"""Number of test rows and rank of the true answer of each row. They are stored in the report folder for comparisons of runs row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.batch import Catalog, RankedRows
from malleable.datamodules.files.atomic import atomic_write
from malleable.lightning_modules.base import BaseModule
from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows
from malleable.lightning_modules.metrics.row_ranks import RowRanks
from malleable.lightning_modules.metrics.significance import Floats, bootstrap_interval, row_values

ROWS_FILE = "test_rows.safetensors"
# Keys in the metadata of the file.
CONDITIONS = "conditions"  # checksums of what the test rows contain, by name
INPUTS = "inputs"  # what metrics are computed with, see `ExposureMetrics.inputs`
_FIELDS = ("true items", "seen items", "candidates")


class RowRecorder:
    """Count the rows of a test, and collect the rank of the true answer of each row.

    The ranks are computed by the first metric of the module with an attribute ``row_ranks``, see
    :class:`~malleable.lightning_modules.metrics.row_ranks.RowRanks`.

    Attributes:
        number: Number of test rows, without repeated rows; ``None`` if it is unknown.
        rows: ``sample_id``, ``target`` and ``rank`` of each row; empty if the module computes no ranks.
        values: Per-row values of metrics that cannot be computed from ranks, by metric name.
        digest: Checksum of targets, seen items, candidates and titles of the rows.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.rows: dict[str, Tensor] = {}
        self.values: dict[str, Floats] = {}
        self.conditions: dict[str, str] = {}
        self.inputs: dict[str, dict[str, str]] = {}
        self._ranks: RowRanks | None = None
        self._count: Tensor | None = None

    def start(self, module: LightningModule) -> None:
        """Reset the state, and connect the first metric that computes ranks."""
        self.number, self.rows, self.values, self.inputs, self._count = None, {}, {}, {}, None
        own: dict[str, Any] = module.metrics("test") if isinstance(module, BaseModule) else {}
        metric = next((metric for metric in own.values() if hasattr(metric, "row_ranks")), None)
        self._ranks = RowRanks() if metric is not None else None
        if metric is not None:
            metric.row_ranks = self._ranks

    def count(self, batch: Any) -> None:
        """Count the rows of a batch without repeated rows, and add the hashes of their fields."""
        sample_id = getattr(batch, "sample_id", None)
        if isinstance(sample_id, Tensor):
            fields = (batch.target[:, None], batch.seen, batch.candidates) if isinstance(batch, RankedRows) else (None,) * len(_FIELDS)
            total = torch.stack([hash_rows(sample_id, [field]) for field in fields])
            self._count = total if self._count is None else self._count + total

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Gather the rows of all ranks. All ranks must call this method."""
        count = torch.zeros(len(_FIELDS), 2, dtype=torch.long, device=module.device) if self._count is None else self._count
        numbers, totals = trainer.strategy.reduce(count, reduce_op="sum").T.tolist()
        self.number = numbers[0] or None
        self.conditions = {name: f"{total & (1 << 64) - 1:016x}" for name, total in zip(_FIELDS, totals, strict=True)}
        catalog = getattr(module, "catalog", None)
        if isinstance(catalog, Catalog):
            self.conditions["titles"] = f"{len(catalog)} titles ({hashlib.sha256(json.dumps(catalog.titles).encode()).hexdigest()[:8]})"
        if self._ranks is not None:
            self.rows = self._ranks.gather(module.device)
            self._ranks = None

    def read_inputs(self, module: LightningModule) -> None:
        """Record what the metrics of the test were computed with; after the module has computed them."""
        self.inputs = metric_inputs(module.metrics("test")) if isinstance(module, BaseModule) else {}

    def add(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add per-row values of metrics that cannot be computed from ranks, by metric name. Values ``nan`` (no value for this row) are omitted."""
        columns = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
        self.values |= {name: column[~np.isnan(column)] for name, column in columns.items()}

    def save(self, folder: Path) -> None:
        """Write the rows to the report folder, if there are any."""
        if self.rows:
            with atomic_write(folder / ROWS_FILE) as path:
                save_file(self.rows, path, metadata={CONDITIONS: json.dumps(self.conditions), INPUTS: json.dumps(self.inputs, sort_keys=True)})

    def interval(self, metric: str) -> str | None:
        """Return the 95 % bootstrap interval of a metric over the test rows, as text; ``None`` if its per-row values are unknown."""
        values = self.values.get(metric)
        if values is None and len(self.rows.get("rank", ())) > 1:
            values = row_values(metric, self.rows["rank"])
        if values is None or not len(values):
            return None
        _, low, high = bootstrap_interval(values)
        return f"{low:.4f} – {high:.4f}" if high < 10 else f"{low:.2f} – {high:.2f}"


def metric_inputs(metrics: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return what metrics are computed with, by name; metrics without a method ``inputs`` are omitted."""
    return {name: found for metric in metrics.values() if hasattr(metric, "inputs") for name, found in metric.inputs().items()}
