"""Recommendations on disk, readable by people and by programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from malleable.callbacks.files import replacing
from malleable.datamodules.batch import Batch, Recommendations


class PredictionWriter(Callback):
    """Write what ``predict`` recommends, in the order of the rows' ids and whatever the number of devices.

    ``predictions.csv`` has a line for each item (``sample_id, rank, item_id, title, score``), ``predictions.jsonl`` one for each
    row (``{"sample_id": ..., "items": [{"rank": ..., "item_id": ..., "title": ..., "score": ...}, ...]}``).

    Args:
        dirpath: Folder of the files; default: the run folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.folder: Path | None = None
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; all ranks agree on it."""
        self.folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier predictions."""
        self._parts = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's recommendations."""
        if not isinstance(outputs, Recommendations) or not isinstance(batch, Batch):
            raise MisconfigurationException(
                f"PredictionWriter writes Recommendations for a Batch, but {type(pl_module).__name__}.predict_step gave {type(outputs).__name__} "
                f"for {type(batch).__name__}; leave PredictionWriter out"
            )
        self._parts.append((batch.sample_id.cpu(), outputs.item_ids.cpu(), outputs.scores.cpu()))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather from all ranks, and write on rank zero."""
        sample_ids, items, scores = (self._gather(trainer, pl_module, place) for place in range(3))
        self._parts = []
        if trainer.is_global_zero:
            catalog = getattr(pl_module, "catalog", None) or getattr(getattr(trainer, "datamodule", None), "catalog", None)
            self.write(sample_ids, items, scores, catalog.titles if catalog is not None else ())
        trainer.strategy.barrier("predictions")

    def write(self, sample_ids: Tensor, items: Tensor, scores: Tensor, titles: Sequence[str]) -> None:
        """Write both files, each whole or not at all.

        Args:
            sample_ids: ``(R,)`` in any order; negative rows are repeats and left out.
            items: ``(R, k)``, -1 where there is none.
            scores: ``(R, k)``.
            titles: Titles by item id; none are written where they are unknown.
        """
        assert self.folder is not None
        rows = list(_rows(sample_ids, items, scores, titles))
        with replacing(self.folder / "predictions.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("sample_id", "rank", "item_id", "title", "score"))
            writer.writerows((row["sample_id"], *item.values()) for row in rows for item in row["items"])
        with replacing(self.folder / "predictions.jsonl") as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        rank_zero_info(f"recommendations for {len(rows)} rows: {self.folder / 'predictions.csv'}")

    def _gather(self, trainer: Trainer, module: LightningModule, place: int) -> Tensor:
        """One of the three parts, of all batches and ranks; a rank without rows adds nothing."""
        own = [part[place] for part in self._parts]
        dimensions = 1 if place == 0 else 2
        joined = (torch.cat(own) if own else torch.empty((0,) * dimensions, dtype=torch.float if place == 2 else torch.long)).to(module.device)
        parts = [joined] if trainer.world_size == 1 else gather_all_tensors(joined)
        return torch.cat([part for part in parts if len(part)] or parts[:1]).cpu()


def _rows(sample_ids: Tensor, items: Tensor, scores: Tensor, titles: Sequence[str]) -> Iterator[dict[str, Any]]:
    for index in sample_ids.argsort(stable=True).tolist():
        if sample_ids[index] < 0:
            continue
        pairs = [(item, score) for item, score in zip(items[index].tolist(), scores[index].tolist(), strict=True) if item >= 0]
        yield {
            "sample_id": int(sample_ids[index]),
            "items": [
                {"rank": rank, "item_id": item, "title": titles[item] if titles else "", "score": round(score, 6)}
                for rank, (item, score) in enumerate(pairs, start=1)
            ],
        }
