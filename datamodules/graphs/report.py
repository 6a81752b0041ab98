"""What a graph is like: counts, repeats, what training never saw, and relations that give the answers away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.sources.graphs.base import GraphTables, Ints, pack

Mask = NDArray[np.bool_]

TWIN_SHARE = 0.8  # as Akrami et al.
LEAK_SHARE = 0.01  # of a split, from which on there is a warning


@dataclass(frozen=True)
class Twin:
    """Two relations of which one tells the other.

    Attributes:
        relation: Label.
        other: Label.
        reversed: Whether head and tail swap places (an inverse), or keep them (a duplicate).
        share: The smaller share of the two relations' pairs that the other has, too.
    """

    relation: str
    other: str
    reversed: bool
    share: float


@dataclass(frozen=True)
class GraphReport:
    """Figures of a graph; splits are ``train``, ``val``, ``test``.

    Attributes:
        entities: Number of entities.
        relations: Number of original relations.
        triples: Triples by split.
        repeated: Of these, lines that repeat one of the same split.
        known: Triples of validation and test that training has, too.
        unseen: Triples of validation and test with an entity or relation that training lacks.
        unseen_entities: Entities that training lacks.
        queries: Distinct training queries, both directions.
        largest_answer: Training answers of the query that has most.
        symmetric: Relations most of whose pairs stand in both directions.
        twins: Pairs of relations that tell each other.
        leaked: Triples of validation and test that a training triple gives away through a twin.
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
        """Bring back what :func:`dataclasses.asdict` made."""
        return cls(**{**plain, "twins": [Twin(**twin) for twin in plain["twins"]]})

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield name and text of each figure worth a line."""
        counts = " / ".join(f"{count:,}" for count in self.triples.values())
        yield "graph", f"{self.entities:,} entities, {self.relations:,} relations, {counts} triples ({' / '.join(self.triples)})"
        share = self.queries / max(1, 2 * self.triples["train"])
        yield "queries", f"{self.queries:,} distinct training queries ({share:.1%} of all), at most {self.largest_answer:,} answers to one"
        if any(self.repeated.values()):
            yield "repeated lines", f"{_counts(self.repeated)}; each counts as often as it occurs"
        if self.symmetric:
            yield "symmetric relations", _some(self.symmetric)

    def warnings(self) -> Iterator[str]:
        """Say what makes figures worth less than they seem."""
        if any(self.known.values()):
            yield f"triples that training has, too: {_counts(self.known)}; a model that only remembers answers them"
        sizes = {split: max(1, self.triples[split]) for split in self.leaked}
        if any(count / sizes[split] >= LEAK_SHARE for split, count in self.leaked.items()):
            shares = ", ".join(f"{count / sizes[split]:.1%} of {split}" for split, count in self.leaked.items())
            pairs = [f"{twin.relation} {'inverts' if twin.reversed else 'repeats'} {twin.other} ({twin.share:.0%})" for twin in self.twins]
            yield (
                f"training gives answers away: {shares} follow from a training triple by {_some(pairs)}. Figures on such a graph (WN18, FB15k) say "
                "little; leave one relation of each pair out"
            )


def report(tables: GraphTables) -> GraphReport:
    """Examine a graph.

    Two relations are twins where each has at least 0.8 of the other's pairs, head and tail swapped or not; a triple leaks where training has
    its pair under a twin.

    Source:
        K. Toutanova and D. Chen (2015), CVSC, section 4.1, for the leak; F. Akrami et al. (2020), arXiv:2003.08001, section 4, for the
        threshold of both shares. Differs: shares are taken over all splits, so that a random split does not hide a twin.
    """
    splits = {split: tables.triples.get(split, np.zeros((0, 3), dtype=np.int64)) for split in ("train", "val", "test")}
    train = splits["train"]
    held = {split: rows for split, rows in splits.items() if split != "train"}
    sizes = len(tables.entities), len(tables.relations)
    codes = {split: pack(rows, *sizes) for split, rows in splits.items()}
    distinct = {split: np.unique(own, return_index=True)[1] for split, own in codes.items()}
    every = np.concatenate(list(splits.values()))[np.unique(np.concatenate(list(codes.values())), return_index=True)[1]]
    seen = [np.isin(np.arange(len(labels)), train[:, columns]) for labels, columns in ((tables.entities, [0, 2]), (tables.relations, [1]))]
    asked = both_directions(train[distinct["train"]], sizes[1])
    _, answers = np.unique(asked[:, 0] * 2 * sizes[1] + asked[:, 1], return_counts=True)
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
    """Make the two queries of each triple.

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
    """Find symmetric relations, and pairs of relations with how they relate and their share."""
    sizes = np.bincount(triples[:, 1], minlength=num_relations)
    pair, back = triples[:, 0] * num_entities + triples[:, 2], triples[:, 2] * num_entities + triples[:, 0]
    order = np.argsort(pair, kind="stable")
    symmetric, twins = [], []
    for swap, looked_up in ((0, pair), (1, back)):
        # All triples whose pair is this one, joined: (relation of this, relation of that).
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
    """Which rows a training triple gives away, ``(N,)`` bool."""
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
