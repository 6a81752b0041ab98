"""A graph of twelve people whose relations obey rules, its queries, and a data module of them."""

from typing import Any

import torch

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import KnowledgeGraph, QueryBatch

PEOPLE = 12


def tiny_graph() -> KnowledgeGraph:
    """Twelve in a ring: who is next, who is two on, who is opposite."""
    return KnowledgeGraph(tuple(f"person {i}" for i in range(PEOPLE)), ("next", "second", "opposite"), degree=(6,) * PEOPLE)


def tiny_triples() -> list[tuple[int, int, int]]:
    """All triples of the ring."""
    return [(i, r, (i + step) % PEOPLE) for i in range(PEOPLE) for r, step in enumerate((1, 2, 6))]


def query_rows(triples: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Both queries of each triple, with the whole ring as the filter."""
    both = [pair for h, r, t in triples for pair in ((h, r, t), (t, r + 3, h))]
    steps = (1, 2, 6, -1, -2, -6)
    return [{"sample_id": i, "head": h, "relation": r, "target": [t], "known": [(h + steps[r]) % PEOPLE]} for i, (h, r, t) in enumerate(both)]


def grouped_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each distinct query, with all its true tails."""
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        group = groups.setdefault((row["head"], row["relation"]), {**row, "sample_id": len(groups), "target": []})
        group["target"] = [*group["target"], *row["target"]]
    return list(groups.values())


def collate_queries(rows: list[dict[str, Any]], filtered: bool = True) -> QueryBatch:
    """Make a batch of query rows."""

    def ragged(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(entity, place) for place, row in enumerate(rows) for entity in row[name]]
        entity, row = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        return entity, row

    (target, target_row), (known, known_row) = ragged("target"), ragged("known")
    if not filtered:
        known, known_row = known[:0], known_row[:0]
    columns = (torch.tensor([row[name] for row in rows]) for name in ("sample_id", "head", "relation"))
    return QueryBatch(*columns, target, target_row, known, known_row)


class TinyGraphData(BaseDataModule):
    """The ring: all triples to learn and to test, with their queries in either direction."""

    def __init__(self, train: Any = None, **changes: Any) -> None:
        super().__init__(**{"batch_size": 4, **changes})
        self.graph = tiny_graph()
        self._train = train

    def setup(self, stage: str) -> None:
        super().setup(stage)
        rows = query_rows(tiny_triples())
        self.train_dataset = self._train or rows
        self.val_dataset, self.test_dataset, self.predict_dataset = rows[:10], rows[:13], rows[:5]

    def collate(self, rows):
        return collate_queries(rows)

    def row_tokens(self):
        return [len(row["target"]) for row in self.train_dataset]
