"""Rows of a test: their number, and the rank of each true answer, stored beside the report so that runs can be compared row by row."""

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

from malleable.datamodules.batch import AnswerBatch, Catalog
from malleable.datamodules.files.atomic import atomic_write
from malleable.lightning_modules.base import BaseModule
from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows
from malleable.lightning_modules.metrics.row_ranks import RowRanks
from malleable.lightning_modules.metrics.significance import Floats, bootstrap_interval, row_values

ROWS_FILE = "test_rows.safetensors"
DIGEST = "digest"  # key in the metadata of the file: checksum of targets, seen items, candidates and titles


class RowRecorder:
    """Counts the rows of a test and collects the ranks that the module's own metrics compute.

    Metrics take part that have an attribute ``row_ranks``, see :class:`~malleable.lightning_modules.metrics.row_ranks.RowRanks`.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.rows: dict[str, Tensor] = {}
        self.values: dict[str, Floats] = {}
        self.digest = ""
        self._ranks: RowRanks | None = None
        self._count: Tensor | None = None

    def start(self, module: LightningModule) -> None:
        """Ask the first metric of ranks for those of single rows."""
        self.number, self.rows, self.values, self._count = None, {}, {}, None
        own: dict[str, Any] = module.metrics("test") if isinstance(module, BaseModule) else {}
        metric = next((metric for metric in own.values() if hasattr(metric, "row_ranks")), None)
        self._ranks = RowRanks() if metric is not None else None
        if metric is not None:
            metric.row_ranks = self._ranks

    def count(self, batch: Any) -> None:
        """Count the rows of a batch, repeats left out, and add up a digest of what they ask."""
        sample_id = getattr(batch, "sample_id", None)
        if isinstance(sample_id, Tensor):
            asked = [batch.target[:, None], batch.seen, batch.candidates] if isinstance(batch, AnswerBatch) else []
            total = hash_rows(sample_id, asked)
            self._count = total if self._count is None else self._count + total

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Gather from all ranks; each must call it."""
        count = torch.zeros(2, dtype=torch.long, device=module.device) if self._count is None else self._count
        number, total = trainer.strategy.reduce(count, reduce_op="sum").tolist()
        self.number = number or None
        catalog = getattr(module, "catalog", None)
        items = json.dumps(catalog.titles if isinstance(catalog, Catalog) else [])
        self.digest = hashlib.sha256(f"{total} {items}".encode()).hexdigest()[:16]
        if self._ranks is not None:
            self.rows = self._ranks.gather(module.device)
            self._ranks = None

    def add(self, values: Mapping[str, Sequence[float]]) -> None:
        """Add per-row values of other metrics, by metric; rows without a value are left out."""
        columns = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
        self.values |= {name: column[~np.isnan(column)] for name, column in columns.items()}

    def save(self, folder: Path) -> None:
        """Write the rows into the folder of a report; nothing where there are none."""
        if self.rows:
            with atomic_write(folder / ROWS_FILE) as path:
                save_file(self.rows, path, metadata={DIGEST: self.digest})

    def interval(self, metric: str) -> str | None:
        """Return the 95 % interval of a metric, a bootstrap over the test rows; ``None`` where its rows are not known."""
        values = self.values.get(metric)
        if values is None and len(self.rows.get("rank", ())) > 1:
            values = row_values(metric, self.rows["rank"])
        if values is None or not len(values):
            return None
        _, low, high = bootstrap_interval(values)
        return f"{low:.4f} – {high:.4f}" if high < 10 else f"{low:.2f} – {high:.2f}"
