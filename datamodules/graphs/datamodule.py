"""Data module of knowledge graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.files.fetch import cache_folder
from malleable.datamodules.graphs.labels import read_descriptions, read_queries, read_types
from malleable.datamodules.graphs.queries import Answers, GroupedQueries, QueryRows
from malleable.datamodules.graphs.report import GraphReport, Mask
from malleable.datamodules.graphs.store import SPLITS, GraphStore
from malleable.datamodules.recommendation.summary import WARNING, log_summary
from malleable.datamodules.sources.graphs.base import GraphSource, Ints


class KnowledgeGraphDataModule(BaseDataModule):
    """Data module of queries ``(h, r, ?)`` to a knowledge graph, for models that rank all entities.

    Each triple ``(h, r, t)`` gives two queries, ``(h, r, ?)`` and ``(t, r + R, ?)``, in training, validation and test. Entities of all splits are
    ranked, including entities that are not in training. ``prepare_data`` numbers the triples and collects the known answers of all queries in a
    memory-mapped cache, which all ranks share. ``setup`` logs statistics of the graph and warns of relations that leak test answers.

    The last batch of a training epoch may be short. Losses are normalised by ``num_step_tokens``, so that they are correct on any number of devices.

    Args:
        source: Source of the triples.
        group_queries: Train with each distinct query once, with all its tails. Training is faster, and the loss of an epoch is the same sum over
            triples, but a batch contains other triples.
        unseen_entities: Treatment of validation and test triples with an entity or relation that is not in training: ``keep`` (as in published
            figures), ``drop`` or ``error``.
        types_file: Types of entities, see :func:`~malleable.datamodules.graphs.labels.read_types`.
        descriptions_file: Descriptions of entities, see :func:`~malleable.datamodules.graphs.labels.read_descriptions`.
        predict_file: Queries of prediction, see :func:`~malleable.datamodules.graphs.labels.read_queries`.
        train_limit: Maximum number of training triples, which are sampled randomly, e.g. to measure speed.
        val_limit: Maximum number of validation triples, which are sampled randomly.
        cache_dir: Folder of the cache; default: ``$MALLEABLE_CACHE`` or the user's cache folder.
        batch_size: Maximum number of queries of a training batch on one device.
        global_batch_size: Number of queries of an optimizer step over all devices; default: ``batch_size`` times the number of devices.
        eval_batch_size: Number of queries of a batch in validation, test and prediction; default: ``batch_size``.
        seed: Seed of the order of queries and of all random choices.

    Attributes:
        graph: Labels of entities and relations. This and the other attributes are available after ``setup``.
        answers: Known answers of all queries.
        report: Statistics of the graph.
        types: Types of each entity; empty without a file.
        descriptions: Description of each entity; empty without a file.

    Raises:
        ValueError: If an argument is out of range, or if the data cannot be used.
    """

    drop_last: ClassVar[bool] = False
    predict_options: ClassVar[str] = "predict_file"
    graph: KnowledgeGraph
    answers: Answers
    report: GraphReport
    types: tuple[tuple[str, ...], ...] = ()
    descriptions: tuple[str, ...] = ()

    def __init__(
        self,
        source: GraphSource,
        group_queries: bool = False,
        unseen_entities: Literal["keep", "drop", "error"] = "keep",
        types_file: str | None = None,
        descriptions_file: str | None = None,
        predict_file: str | None = None,
        train_limit: int | None = None,
        val_limit: int | None = None,
        cache_dir: str | None = None,
        batch_size: int = 128,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, global_batch_size, eval_batch_size, seed=seed)
        if unseen_entities not in ("keep", "drop", "error"):
            raise ValueError(f"unseen_entities must be keep, drop or error, got {unseen_entities!r}")
        for name, limit in (("train_limit", train_limit), ("val_limit", val_limit)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be >= 1, got {limit}")
        self.source = source
        self.group_queries = group_queries
        self.unseen_entities = unseen_entities
        self.types_file = types_file
        self.descriptions_file = descriptions_file
        self.predict_file = predict_file
        self.limits = {"train": train_limit, "val": val_limit, "test": None}
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self._store: GraphStore | None = None
        self._used: dict[str, tuple[Ints, Ints]] = {}

    def prepare_data(self) -> None:
        """Download, read and number the triples into the cache, unless they are there."""
        self._open()

    def setup(self, stage: str) -> None:
        """Open the cache, set the graph and the datasets, and log the statistics of the graph."""
        super().setup(stage)
        if self.train_dataset is not None:
            return
        store = self._open()
        self.graph, self.answers, self.report = store.graph, store.answers, store.report
        if self.types_file is not None:
            self.types = read_types(Path(self.types_file).expanduser(), self.graph)
        if self.descriptions_file is not None:
            self.descriptions = read_descriptions(Path(self.descriptions_file).expanduser(), self.graph)
        ids = np.split(np.arange(sum(map(len, store.queries.values()))), np.cumsum([len(store.queries[split]) for split in SPLITS])[:-1])
        rows = {split: self._selected(split, store.queries, own) for split, own in zip(SPLITS, ids, strict=True)}
        self._used = rows
        log_summary(f"graph of {type(self.source).__name__}", self.data_summary())
        grouped = self.group_queries
        self.train_dataset = GroupedQueries(*rows["train"], self.num_relations) if grouped else QueryRows(*rows["train"])
        self.val_dataset, self.test_dataset = (QueryRows(*rows[split], self.answers) for split in ("val", "test"))
        if self.predict_file is not None:
            queries = read_queries(Path(self.predict_file).expanduser(), self.graph, getattr(self.source, "delimiter", None))
            self.predict_dataset = QueryRows(queries, np.arange(len(queries)), self.answers)

    @property
    def num_entities(self) -> int:
        """Number of entities, available after ``setup``."""
        return self.graph.num_entities

    @property
    def num_relations(self) -> int:
        """Number of relations including reciprocals, available after ``setup``."""
        return self.graph.num_relations

    def row_tokens(self) -> Sequence[int]:
        """Return the number of true tails of each training row."""
        tokens: Sequence[int] = self.train_dataset.row_tokens()
        return tokens

    def _open(self) -> GraphStore:
        if self._store is None:
            self._store = GraphStore.open_or_build(self.source, (self.cache_dir or cache_folder()) / "knowledge_graph")
        return self._store

    def _selected(self, split: str, queries: dict[str, Ints], ids: Ints) -> tuple[Ints, Ints]:
        """Return the selected queries of a split, ``(Q, 3)``, and their ids, which do not depend on the selection."""
        own = queries[split]
        chosen = np.ones(len(own) // 2, dtype=bool)
        if split != "train" and self.unseen_entities != "keep":
            chosen &= self._seen(split, queries)
        limit = self.limits[split]
        if limit is not None and limit < chosen.sum():
            kept = np.random.default_rng(self.seed).permutation(np.flatnonzero(chosen))[:limit]
            chosen = np.isin(np.arange(len(chosen)), kept)
        # If all queries are selected, the memory map is used without a copy.
        return (own, ids) if chosen.all() else (own[np.repeat(chosen, 2)], ids[np.repeat(chosen, 2)])

    def _seen(self, split: str, queries: dict[str, Ints]) -> Mask:
        """Return which triples of a split only have entities and relations that are in training, ``(N,)`` bool."""
        heads, relations, tails = queries[split][::2].T
        entities = np.array(self.graph.degree) > 0
        seen: Mask = entities[heads] & entities[tails] & np.isin(relations, queries["train"][::2, 1])
        if self.unseen_entities == "error" and not seen.all():
            first = int(seen.argmin())
            labels = self.graph.entities[heads[first]], self.graph.relations[relations[first]], self.graph.entities[tails[first]]
            raise ValueError(
                f"{int((~seen).sum())} of {len(seen)} {split} triples have an entity or a relation that is not in training (first: {labels}); "
                "correct the split, or set unseen_entities to keep or drop"
            )
        return seen

    def data_summary(self) -> list[tuple[str, str]]:
        """Return the properties of the graph as pairs of name and text, then the warnings; available after ``setup``."""
        facts = list(self.report.facts())
        if any(self.report.unseen.values()) and self.unseen_entities != "error":
            treatment = "they are ranked" if self.unseen_entities == "keep" else "they are omitted, so figures are not comparable with published ones"
            unseen = ", ".join(f"{count:,} of {split}" for split, count in self.report.unseen.items())
            number = self.report.unseen_entities
            facts.append(("unseen", f"triples with an entity or relation that is not in training ({number} entities): {unseen}; {treatment}"))
        used = {split: len(self._used[split][0]) // 2 for split in SPLITS}
        rows = [f"{split} {used[split]:,}" + (f" of {every:,}" if used[split] < every else "") for split, every in self.report.triples.items()]
        facts.append(("triples used", ", ".join(rows) + "; each gives a query for its tail and a query for its head"))
        return [*facts, *((WARNING, text) for text in self.report.warnings())]
