"""A shop of eight items and a dozen users whose next item is mostly the neighbour of the last: recommendation in milliseconds."""

from collections.abc import Sequence
from typing import Any

import torch

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import AnswerBatch, Catalog, Example
from malleable.datamodules.collate import collate_answers

TITLES = ("Tea | green", "Kettle", "Cup", "Saucer", "Sugar $5", "Spoon", "Cake", "Napkin")
GENRES = (("drink",), ("kitchen",), ("kitchen",), ("kitchen",), ("food",), ("kitchen",), ("food",), ("home", "kitchen"))
HISTORY_LENGTH = 3


def toy_users(count: int = 12) -> list[list[int]]:
    """Sequences of distinct items; the last item of each is for the test."""
    generator = torch.Generator().manual_seed(0)
    users = []
    for user in range(count):
        start, length = user % len(TITLES), 4 + user % 3
        items = [(start + step) % len(TITLES) for step in range(length)]
        swap = int(torch.randint(length - 1, (), generator=generator))
        items[swap], items[swap + 1] = items[swap + 1], items[swap]
        users.append(items)
    return users


def toy_rows(users: Sequence[Sequence[int]], test: bool) -> list[Example]:
    """A row for each position of the training part, or for the last item."""
    rows: list[Example] = []
    for items in users:
        for end in [len(items) - 1] if test else range(1, len(items) - 1):
            history = list(items[max(0, end - HISTORY_LENGTH) : end])
            rows.append(
                {"sample_id": len(rows), "prompt": [1], "answers": [[2]], "item_ids": [items[end]], "history": history, "seen": list(items[:end])}
            )
    return rows


class ToyShop(BaseDataModule):
    """Rows of the toy users; ``popularity=False`` leaves it unknown."""

    catalog: Catalog

    def __init__(self, num_users: int = 12, batch_size: int = 4, global_batch_size: int | None = None, popularity: bool = True) -> None:
        super().__init__(batch_size=batch_size, global_batch_size=global_batch_size)
        self.users = toy_users(num_users)
        self.popularity = popularity

    def setup(self, stage: str) -> None:
        counts = torch.bincount(torch.tensor([item for items in self.users for item in items[:-1]]), minlength=len(TITLES))
        self.catalog = Catalog(TITLES, genres=GENRES, popularity=tuple(counts.tolist()) if self.popularity else ())
        self.train_dataset = toy_rows(self.users, test=False)
        self.val_dataset = self.test_dataset = self.predict_dataset = toy_rows(self.users, test=True)

    def collate(self, rows: Sequence[Any]) -> AnswerBatch:
        return collate_answers(rows)
