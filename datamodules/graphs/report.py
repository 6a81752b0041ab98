"""Statistics of a graph: counts, duplicates, entities that are not in training, and relations that leak test answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.sources.graphs.base import GraphTables, Ints, pack

Mask = NDArray[np.bool_]

TWIN_SHARE = 0.8  # as in Akrami et al.
LEAK_SHARE = 0.01  # share of leaked triples of a split above which there is a warning


@dataclass(frozen=True)
class Twin:
    """Pair of relations, one of which almost follows from the other.

    Attributes:
        relation: Label of the first relation.
        other: Label of the second relation.
        reversed: Whether the second relation is an inverse (head and tail exchanged), otherwise it is a duplicate.
        share: Share of the pairs (head, tail) of one relation that the other relation has, too; the smaller one of the two shares.
    """

    relation: str
    other: str
    reversed: bool
    share: float


@dataclass(frozen=True)
class GraphReport:
    """Statistics of a graph.

    Attributes:
        entities: Number of entities.
        relations: Number of original relations.
        triples: Number of triples by split: ``train``, ``val``, ``test``.
        repeated: Number of duplicate triples within each split.
        known: Number of validation and test triples that are in training, too.
        unseen: Number of validation and test triples with an entity or relation that is not in training.
        unseen_entities: Number of entities that are not in training.
        queries: Number of distinct training queries in both directions.
        largest_answer: Maximum number of training answers of a query.
        symmetric: Relations most of whose pairs occur in both directions.
        twins: Pairs of relations that follow from each other.
        leaked: Number of validation and test triples that follow from a training triple by a twin relation.
    """

    entities: int
    relations: int
    triples: dict[str, int]
    repeated: dict[str, int]
    known: dict[str, int]
    unseen: dict[str, int]
    unseen_entities: int
    queries: int
    largest_answer: int
    symmetric: list[str]
    twins: list[Twin]
    leaked: dict[str, int]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> GraphReport:
        """Build a report from the output of :func:`dataclasses.asdict`."""
        return cls(**{**plain, "twins": [Twin(**twin) for twin in plain["twins"]]})

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the properties of the graph as pairs of name and text."""
        counts = " / ".join(f"{count:,}" for count in self.triples.values())
        yield "graph", f"{self.entities:,} entities, {self.relations:,} relations, {counts} triples ({' / '.join(self.triples)})"
        share = self.queries / max(1, 2 * self.triples["train"])
        yield "queries", f"{self.queries:,} distinct training queries ({share:.1%} of all), a query has at most {self.largest_answer:,} answers"
        if any(self.repeated.values()):
            yield "duplicate triples", f"{_counts(self.repeated)}; each is used as often as it occurs"
        if self.symmetric:
            yield "symmetric relations", _some(self.symmetric)

    def warnings(self) -> Iterator[str]:
        """Yield warnings about properties that make test figures unreliable."""
        if any(self.known.values()):
            yield f"triples that are in training, too: {_counts(self.known)}; a model can answer them by memorisation"
        sizes = {split: max(1, self.triples[split]) for split in self.leaked}
        if any(count / sizes[split] >= LEAK_SHARE for split, count in self.leaked.items()):
            shares = ", ".join(f"{count / sizes[split]:.1%} of {split}" for split, count in self.leaked.items())
            pairs = [f"{twin.relation} {'inverts' if twin.reversed else 'repeats'} {twin.other} ({twin.share:.0%})" for twin in self.twins]
            yield (
                f"training leaks test answers: {shares} follow from a training triple by {_some(pairs)}. Figures on such a graph (WN18, FB15k) are "
                "not meaningful; remove one relation of each pair"
            )


def report(tables: GraphTables) -> GraphReport:
    """Compute the statistics of a graph.

    Two relations are twins if each has at least 0.8 of the pairs (head, tail) of the other, in the same or in the reverse direction. A triple is
    leaked if its pair of entities occurs in training with a twin of its relation.

    Source:
        K. Toutanova and D. Chen (2015), CVSC, section 4.1 (leaks); F. Akrami et al. (2020), arXiv:2003.08001, section 4 (threshold of shares).
        Differs: shares are computed over all splits, so that a random split does not hide a twin.
    """
    splits = {split: tables.triples.get(split, np.zeros((0, 3), dtype=np.int64)) for split in ("train", "val", "test")}
    train = splits["train"]
    held = {split: rows for split, rows in splits.items() if split != "train"}
    sizes = len(tables.entities), len(tables.relations)
    codes = {split: pack(rows, *sizes) for split, rows in splits.items()}
    distinct = {split: np.unique(own, return_index=True)[1] for split, own in codes.items()}
    every = np.concatenate(list(splits.values()))[np.unique(np.concatenate(list(codes.values())), return_index=True)[1]]
    seen = [np.isin(np.arange(len(labels)), train[:, columns]) for labels, columns in ((tables.entities, [0, 2]), (tables.relations, [1]))]
    queries = both_directions(train[distinct["train"]], sizes[1])
    _, answers = np.unique(queries[:, 0] * 2 * sizes[1] + queries[:, 1], return_counts=True)
    symmetric, pairs = _twins(every, *sizes)
    return GraphReport(
        entities=sizes[0],
        relations=sizes[1],
        triples={split: len(rows) for split, rows in splits.items()},
        repeated={split: len(rows) - len(distinct[split]) for split, rows in splits.items()},
        known={split: int(np.isin(codes[split], codes["train"]).sum()) for split in held},
        unseen={split: int((~seen[0][rows[:, [0, 2]]].all(1) | ~seen[1][rows[:, 1]]).sum()) for split, rows in held.items()},
        unseen_entities=int((~seen[0]).sum()),
        queries=len(answers),
        largest_answer=int(answers.max(initial=0)),
        symmetric=[tables.relations[relation] for relation in symmetric],
        twins=[Twin(tables.relations[one], tables.relations[other], bool(swap), share) for one, other, swap, share in pairs],
        leaked={split: int(_leaks(rows, train, pairs, sizes).sum()) for split, rows in held.items()},
    )


def both_directions(triples: Ints, num_relations: int) -> Ints:
    """Return the two queries of each triple.

    Args:
        triples: ``(N, 3)`` of h, r, t.
        num_relations: R.

    Returns:
        ``(2 N, 3)`` of head, relation, target: ``(h, r, t)`` and ``(t, r + R, h)`` of the first triple, then of the second, ...
    """
    heads, relations, tails = triples.T
    queries = np.empty((len(triples), 2, 3), dtype=triples.dtype)
    queries[:, 0] = triples
    queries[:, 1] = np.stack([tails, relations + num_relations, heads], axis=1)
    return queries.reshape(-1, 3)


def _twins(triples: Ints, num_entities: int, num_relations: int) -> tuple[list[int], list[tuple[int, int, int, float]]]:
    """Return symmetric relations, and twins as (relation, other relation, whether reversed, share)."""
    sizes = np.bincount(triples[:, 1], minlength=num_relations)
    pair, back = triples[:, 0] * num_entities + triples[:, 2], triples[:, 2] * num_entities + triples[:, 0]
    order = np.argsort(pair, kind="stable")
    symmetric, twins = [], []
    for swap, looked_up in ((0, pair), (1, back)):
        # Join of all triples with the same pair of entities: (relation of one triple, relation of the other).
        start, stop = np.searchsorted(pair[order], looked_up), np.searchsorted(pair[order], looked_up, side="right")
        counts = stop - start
        this = np.repeat(triples[:, 1], counts)
        that = triples[order, 1][np.arange(counts.sum()) + np.repeat(start - np.cumsum(counts) + counts, counts)]
        codes, shared = np.unique(this * num_relations + that, return_counts=True)
        for one, other, count in zip(codes // num_relations, codes % num_relations, shared, strict=True):
            share = float(count / max(sizes[one], sizes[other]))
            if share >= TWIN_SHARE and one == other and swap:
                symmetric.append(int(one))
            elif share >= TWIN_SHARE and one < other:
                twins.append((int(one), int(other), swap, share))
    return symmetric, twins


def _leaks(rows: Ints, train: Ints, twins: list[tuple[int, int, int, float]], sizes: tuple[int, int]) -> Mask:
    """Return which rows follow from a training triple by a twin relation, ``(N,)`` bool."""
    leaked = np.zeros(len(rows), dtype=bool)
    for one, other, swap, _ in twins:
        for source, target in ((one, other), (other, one)):
            given = np.flatnonzero(rows[:, 1] == source)
            wanted = rows[given][:, [2, 1, 0]] if swap else rows[given]
            wanted[:, 1] = target
            leaked[given] |= np.isin(pack(wanted, *sizes), pack(train[train[:, 1] == target], *sizes))
    return leaked


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} of {split}" for split, number in numbers.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
