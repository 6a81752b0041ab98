"""Base class of sources of knowledge graphs, and numbering of their labels.

To add a source, add a class to this folder and its name to ``datamodules/__init__.pyi``.

- For a published graph with a fixed split, add its files to the table in ``published.py``, and a subclass of ``PublishedGraph`` beside it.
- For another source, create a file with a subclass of :class:`GraphSource`, implement ``files`` and ``load``, and override ``settings`` if arguments
  affect the data (examples: ``triples.py``, ``synthetic.py``). :func:`number` converts labelled triples to :class:`GraphTables`.
"""

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
    """Labels and numbered triples.

    Attributes:
        entities: Distinct labels of entities, by id.
        relations: Distinct labels of relations, by id.
        triples: ``(N, 3)`` int64 of head, relation, tail by split ``train``, ``val``, ``test``, in the order of the files, with duplicates.
    """

    entities: list[str]
    relations: list[str]
    triples: dict[str, Ints]


class GraphSource(ABC):
    """Base class of sources of triples; subclasses state origin, terms and checksums in their docstring."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files of the source, and download them if needed; their content identifies the data."""

    @abstractmethod
    def load(self) -> GraphTables:
        """Read the triples."""

    def settings(self) -> dict[str, object]:
        """Return the settings that affect the data, besides the files."""
        return {}


def pack(triples: Ints, num_entities: int, num_relations: int) -> Ints:
    """Encode each triple as one integer. Codes have the order of the triples; sorting integers is ten times as fast as sorting rows.

    Args:
        triples: ``(N, 3)`` of head, relation, tail.
        num_entities: Number of entities.
        num_relations: Number of relations, including reciprocals if they occur.

    Returns:
        ``(N,)`` int64.

    Raises:
        OverflowError: If the codes exceed the range of int64.
    """
    if num_entities**2 * num_relations > np.iinfo(np.int64).max:
        raise OverflowError(f"{num_entities} entities and {num_relations} relations are too many: triples cannot be encoded in 64 bits")
    heads, relations, tails = triples.astype(np.int64).T
    codes: Ints = (heads * num_relations + relations) * num_entities + tails
    return codes


def number(splits: Mapping[str, Iterable[tuple[str, str, str]]]) -> GraphTables:
    """Replace the labels of triples by ids.

    Ids are the positions in the sorted labels of all splits, so that they do not depend on the order of lines.

    Args:
        splits: Triples (head, relation, tail) by split.
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
    """Return the position of each preliminary number in the sorted labels."""
    places = np.empty(len(found), dtype=np.int64)
    places[[found[label] for label in sorted(found)]] = np.arange(len(found))
    return places
