"""Sequences of twenty items in which the next item follows from the last one, as rows, batches and a data module."""

from collections.abc import Sequence
from typing import Any

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import Catalog, SequenceBatch
from malleable.datamodules.collate import collate_sequences

NUM_ITEMS = 20
TITLES = tuple(f"Item {number}" for number in range(NUM_ITEMS))


def cyclic_items(user: int, length: int = 8) -> list[int]:
    """Items of a user, each followed by the next number."""
    return [(3 * user + step) % NUM_ITEMS for step in range(length)]


def training_rows(count: int = 64) -> list[dict[str, Any]]:
    """Histories of different lengths, with times and two types of interactions."""
    rows = []
    for user in range(count):
        items = cyclic_items(user, 5 + user % 4)
        times = [1e9 + 3600.0 * step * (1 + user % 3) for step in range(len(items))]
        rows.append({"sample_id": user, "items": items, "times": times, "behaviors": [step % 2 for step in range(len(items))]})
    return rows


def query_rows(count: int = 20) -> list[dict[str, Any]]:
    """Histories with their next item; all items may be recommended."""
    rows = []
    for user in range(count):
        *items, target = cyclic_items(user, 3 + user % 5)
        fields = {"times": [1e9 + 3600.0 * step for step in range(len(items))], "behaviors": [step % 2 for step in range(len(items))]}
        rows.append({"sample_id": user, "items": items, "target": target, "seen": [], **fields})
    return rows


def packed_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pack rows into one."""
    row: dict[str, Any] = {"sample_id": rows[0]["sample_id"]}
    for name in ("items", "times", "behaviors"):
        row[name] = [value for own in rows for value in own[name]]
    row["document_ids"] = [number for number, own in enumerate(rows, 1) for _ in own["items"]]
    return row


def sequence_catalog() -> Catalog:
    """Twenty items; the first ones are the most popular."""
    return Catalog(TITLES, popularity=tuple(range(NUM_ITEMS, 0, -1)))


class ToySequences(BaseDataModule):
    """Training rows and rows to rank items for."""

    behaviors = ("view", "purchase")

    def __init__(self, train: Any = None, **changes: Any) -> None:
        super().__init__(**{"batch_size": 8, **changes})
        self.catalog = sequence_catalog()
        self._train = train

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = self._train or training_rows()
        self.val_dataset, self.test_dataset, self.predict_dataset = query_rows(6), query_rows(13), query_rows(5)

    def collate(self, rows: Sequence[Any]) -> SequenceBatch:
        return collate_sequences(rows)

    def row_tokens(self) -> list[int]:
        return [len(row["items"]) - 1 for row in self.train_dataset]
