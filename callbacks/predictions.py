"""Predictions on disk, readable by people and by programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics.utilities.distributed import gather_all_tensors

from malleable.datamodules.batch import Batch, Catalog, Recommendations
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.escape import for_csv

Described = Iterator[tuple[Sequence[Any], Sequence[Sequence[Any]]]]


@runtime_checkable
class DescribesPredictions(Protocol):
    """A module that names what it was asked, and what it answers.

    Attributes:
        query_fields: Names of the parts of a query.
        answer_fields: Names of the parts of an answer.
    """

    query_fields: Sequence[str]
    answer_fields: Sequence[str]

    def describe(self, batch: Any, found: Any) -> Described:
        """Return for each row of a batch the parts of its query, and those of each answer in ``found``, best first."""


class DescribesItems:
    """The same of :class:`~malleable.datamodules.batch.Recommendations` from a catalogue.

    Args:
        catalog: The items. They are written by the source's ids, or by their titles where the source has none.
        users: User of each row by ``sample_id``; ``None`` writes none.
    """

    answer_fields: Sequence[str] = ("item_id", "title", "score")

    def __init__(self, catalog: Catalog, users: Mapping[int, str] | None = None) -> None:
        self.keys = catalog.keys or catalog.titles
        self.titles = catalog.titles
        self.users = users
        self.query_fields: Sequence[str] = () if users is None else ("user_id",)

    def describe(self, batch: Batch, found: Recommendations) -> Described:
        """Return the user where it is known, and the items of each row."""
        for sample_id, items, scores in zip(batch.sample_id.tolist(), *(part.tolist() for part in found), strict=True):
            query = () if self.users is None else (self.users.get(sample_id, ""),)
            yield query, [(self.keys[item], self.titles[item], score) for item, score in zip(items, scores, strict=True) if item >= 0]


class PredictionWriter(Callback):
    """Write what ``predict`` finds, in the order of the rows' ids and whatever the number of devices.

    ``predictions.csv`` has a line for each answer, ``predictions.jsonl`` one for each row, with its answers as ``items``. Of recommendations they
    hold ``sample_id, user_id, rank, item_id, title, score``: ``sample_id`` is the number of the row in the file of histories, from 0,
    ``user_id`` is there where that file has users, and ``item_id`` is the source's own id (the title where the source has none; the first id
    where items of one title were merged). A module that :class:`DescribesPredictions` names its own fields (a knowledge graph's:
    ``sample_id, head, relation, tail, rank, answer, score, uncertainty``).

    In CSV, a text that a spreadsheet would take for a formula stands behind an apostrophe.

    Args:
        dirpath: Folder of the files; default: the run folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.folder: Path | None = None
        self._words: DescribesPredictions | None = None
        self._lines: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; all ranks agree on it."""
        self.folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier predictions, and find who names what is predicted."""
        self._lines = []
        data = getattr(trainer, "datamodule", None)
        catalog = self._catalog(getattr(pl_module, "catalog", None), getattr(data, "catalog", None))
        recommends = catalog is not None and hasattr(pl_module, "recommend")
        if isinstance(pl_module, DescribesPredictions) and not recommends:
            self._words = pl_module
        else:
            self._words = None if catalog is None else DescribesItems(catalog, getattr(data, "predicted_users", None))

    @staticmethod
    def _catalog(own: Catalog | None, other: Catalog | None) -> Catalog | None:
        """The module's catalogue; the data's where it is the same and only that one has ids, as checkpoints of earlier versions have none."""
        if own is None or (not own.keys and other is not None and other.titles == own.titles):
            return other
        return own

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's rows, repeated ones left out."""
        if not isinstance(batch, Batch) or not (isinstance(outputs, Recommendations) or isinstance(pl_module, DescribesPredictions)):
            raise MisconfigurationException(
                f"PredictionWriter writes Recommendations for a Batch, but {type(pl_module).__name__}.predict_step gave {type(outputs).__name__} "
                f"for {type(batch).__name__}; leave PredictionWriter out"
            )
        if self._words is None:
            raise MisconfigurationException(
                f"PredictionWriter writes items by their ids, but neither {type(pl_module).__name__} nor the data module has a catalogue; "
                "set the attribute `catalog` of one of them, or leave PredictionWriter out"
            )
        rows = zip(batch.sample_id.tolist(), self._words.describe(batch, outputs), strict=True)
        self._lines += [self._line(sample_id, query, answers) for sample_id, (query, answers) in rows if sample_id >= 0]

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather from all ranks, and write on rank zero."""
        lines, self._lines = self._gather(trainer, pl_module), []
        if trainer.is_global_zero:
            self.write(lines)
        trainer.strategy.barrier("predictions")

    def write(self, lines: Iterable[str]) -> None:
        """Write both files, each whole or not at all.

        Args:
            lines: Rows in JSON, in any order.
        """
        assert self.folder is not None
        query_fields, answer_fields = (self._words.query_fields, self._words.answer_fields) if self._words is not None else ((), ())
        rows = sorted(map(json.loads, lines), key=lambda row: int(row["sample_id"]))
        with atomic_write(self.folder / "predictions.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("sample_id", *query_fields, "rank", *answer_fields))
            for *query, items in map(dict.values, rows):
                # Ids stay as they are, because they are joined with tables of the user.
                writer.writerows([*query, *(for_csv(part) if name == "title" else part for name, part in item.items())] for item in items)
        with atomic_write(self.folder / "predictions.jsonl") as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        rank_zero_info(f"predictions for {len(rows)} rows: {self.folder / 'predictions.csv'}")

    def _line(self, sample_id: int, query: Sequence[Any], answers: Sequence[Sequence[Any]]) -> str:
        assert self._words is not None
        items = [
            {"rank": rank} | {name: _rounded(part) for name, part in zip(self._words.answer_fields, answer, strict=True)}
            for rank, answer in enumerate(answers, start=1)
        ]
        row = {"sample_id": sample_id} | dict(zip(self._words.query_fields, query, strict=True)) | {"items": items}
        return json.dumps(row, ensure_ascii=False)

    def _gather(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """The lines of all ranks, as bytes; a rank without rows adds nothing."""
        if trainer.world_size == 1:
            return self._lines
        text = "\n".join(self._lines).encode()
        parts = gather_all_tensors(torch.tensor(bytearray(text), dtype=torch.uint8, device=module.device))
        # Line feeds within a label are escaped in JSON.
        return [line for part in parts for line in bytes(part.cpu().numpy()).decode().split("\n") if line]


def _rounded(part: Any) -> Any:
    return round(part, 6) if isinstance(part, float) else part
