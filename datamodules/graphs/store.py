"""Cache of the prepared data of a graph: queries, known answers and report, built once and memory-mapped by all ranks."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.files.cache import Numbers, hash_settings, open_arrays, open_or_build, write_arrays
from malleable.datamodules.files.fetch import sha256_of
from malleable.datamodules.graphs.queries import Answers, Lists
from malleable.datamodules.graphs.report import GraphReport, both_directions, report
from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, Ints

log = logging.getLogger(__name__)

# Increase it when the format of the cache changes.
FORMAT = 1
SPLITS = ("train", "val", "test")


@dataclass
class GraphStore:
    """Prepared data of a graph.

    Attributes:
        graph: Labels of entities and relations.
        queries: ``(2 N, 3)`` int32 of head, relation, target by split: both directions of the first triple, then of the second, ...
        answers: Known answers of all queries, over all splits.
        report: Statistics of the graph.
    """

    graph: KnowledgeGraph
    queries: dict[str, Ints]
    answers: Answers
    report: GraphReport

    @classmethod
    def open_or_build(cls, source: GraphSource, folder: Path) -> GraphStore:
        """Open the cache of a source below ``folder``, and build it if it is missing or incomplete."""
        target = folder / fingerprint(source)
        arrays, meta = open_or_build(target, open_arrays, lambda folder: write_arrays(folder, *build(source.load())), "the graph")
        # Convert to plain arrays, because operations on `memmap` create new `memmap` objects, which is slow.
        plain: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
        frequency = np.bincount(plain["train"][::2, 1], minlength=len(meta["relations"]))
        graph = KnowledgeGraph(tuple(meta["entities"]), tuple(meta["relations"]), tuple(plain["degree"].tolist()), tuple(frequency.tolist()))
        answers = Answers(plain["answer_keys"], Lists(plain["answer_offsets"], plain["answer_tails"]), graph.num_relations)
        return cls(graph, {split: plain[split] for split in SPLITS}, answers, GraphReport.from_plain(meta["report"]))


def fingerprint(source: GraphSource) -> str:
    """Return the name of the cache folder of a source."""
    return hash_settings(
        {"format": FORMAT, "source": [type(source).__qualname__, source.settings(), [sha256_of(path) for path in source.files()]]},
    )


def build(tables: GraphTables) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Return the arrays and the plain data of the cache of a graph."""
    none = np.zeros((0, 3), dtype=np.int64)
    num_relations = len(tables.relations)
    queries = {split: both_directions(tables.triples.get(split, none), num_relations) for split in SPLITS}
    answers = Answers.of(np.concatenate(list(queries.values())), 2 * num_relations)
    arrays: dict[str, Any] = {split: rows.astype(np.int32) for split, rows in queries.items()}
    arrays |= {"answer_keys": answers.keys, "answer_offsets": answers.tails.offsets, "answer_tails": answers.tails.values.astype(np.int32)}
    heads, _, tails = tables.triples["train"].T
    count = len(tables.entities)
    # A loop (a triple with equal head and tail) counts once for its entity.
    loops = np.bincount(heads[heads == tails], minlength=count)
    arrays["degree"] = np.bincount(heads, minlength=count) + np.bincount(tails, minlength=count) - loops
    return arrays, {"entities": tables.entities, "relations": tables.relations, "report": asdict(report(tables))}
