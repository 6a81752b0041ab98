"""What a source of a knowledge graph gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class GraphTables:
    """Triples by number.

    Attributes:
        entities: Distinct labels, by id.
        relations: Distinct labels, by id.
        triples: ``(N, 3)`` int64 of head, relation, tail by split: ``train``, ``val``, ``test``; in the order of the files, repeats included.
    """

    entities: list[str]
    relations: list[str]
    triples: dict[str, Ints]


class GraphSource(ABC):
    """Where triples come from; subclasses state origin, terms and checksums in their docstring."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files the data is read from, fetching them where needed; their content identifies the data."""

    @abstractmethod
    def load(self) -> GraphTables:
        """Read the triples."""

    def settings(self) -> dict[str, object]:
        """Return what besides the files decides the data."""
        return {}


def pack(triples: Ints, num_entities: int, num_relations: int) -> Ints:
    """Write each triple as one integer that orders as the triple does: sorting these is ten times as fast as sorting rows.

    Args:
        triples: ``(N, 3)`` of head, relation, tail.
        num_entities: E.
        num_relations: Number of relations that occur, with reciprocals where there are any.

    Returns:
        ``(N,)`` int64.

    Raises:
        OverflowError: If the graph has more possible triples than int64 holds.
    """
    if num_entities**2 * num_relations > np.iinfo(np.int64).max:
        raise OverflowError(f"{num_entities} entities and {num_relations} relations make more possible triples than 64 bits hold")
    heads, relations, tails = triples.astype(np.int64).T
    codes: Ints = (heads * num_relations + relations) * num_entities + tails
    return codes


def number(splits: Mapping[str, Iterable[tuple[str, str, str]]]) -> GraphTables:
    """Number labelled triples; the vocabulary is that of all splits, in alphabetical order, so that the order of lines does not matter.

    Args:
        splits: Head, relation, tail by split.
    """
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}

    def ids(rows: Iterable[tuple[str, str, str]]) -> Iterable[int]:
        for head, relation, tail in rows:
            yield entities.setdefault(head, len(entities))
            yield relations.setdefault(relation, len(relations))
            yield entities.setdefault(tail, len(entities))

    triples = {name: np.fromiter(ids(rows), np.int64).reshape(-1, 3) for name, rows in splits.items()}
    places = [_places(entities), _places(relations)]
    for table in triples.values():
        for column, place in enumerate((places[0], places[1], places[0])):
            table[:, column] = place[table[:, column]]
    return GraphTables(sorted(entities), sorted(relations), dict(triples))


def _places(found: Mapping[str, int]) -> Ints:
    """Place of each number among the sorted labels."""
    places = np.empty(len(found), dtype=np.int64)
    places[[found[label] for label in sorted(found)]] = np.arange(len(found))
    return places
