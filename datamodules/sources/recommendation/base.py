"""Base class of sources of recommendation data, and the tables that they return.

For a new source, implement :meth:`Source.files` and :meth:`Source.load` in a new file of this folder, and add the class to
``datamodules/__init__.pyi``. ``movielens.py`` is an example with a download, ``ready_rows.py`` has helpers for data with a fixed split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd


@dataclass(frozen=True)
class InteractionTables:
    """Interactions of users with items, from which the data module creates the rows.

    Attributes:
        interactions: Columns ``user_id`` and ``item_id`` (strings), ``timestamp`` (float, seconds), and optionally ``rating`` (float; a rating, or a
            label 0 or 1), ``split`` (string: train, val or test) and ``behavior`` (string: type of the interaction, e.g. view or purchase).
            Interactions with equal times are in the order of the rows.
        items: Columns ``item_id`` (string), ``title`` (unchanged string of the source), ``genres`` (tuple of strings).
        origin: Files of the tables, for messages.
        notes: Omissions and changes during reading, for the summary of the data.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    notes: tuple[str, ...] = ()
    origin: str = "the source"


class ReadyRow(NamedTuple):
    """Row of a data set with a fixed split. Items are positions in :attr:`ReadyRows.items`; -1 for unknown items.

    Attributes:
        history: Items before the target, oldest first.
        target: The true next item.
        candidates: Items to choose from, in their order in the source; empty for the whole catalogue.
    """

    history: Sequence[int]
    target: int
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class ReadyRows:
    """Rows of a data set with a fixed split, without users.

    Attributes:
        items: Table with the columns of :attr:`InteractionTables.items`.
        rows: Rows by split: ``train``, ``val``, ``test``.
    """

    items: pd.DataFrame
    rows: dict[str, list[ReadyRow]] = field(default_factory=dict)


class Source(ABC):
    """Base class of sources of interactions; subclasses state origin, terms and checksums in their docstring."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files of the source, and download them if needed; their content identifies the data."""

    @abstractmethod
    def load(self) -> InteractionTables | ReadyRows:
        """Read the data."""

    def settings(self) -> dict[str, object]:
        """Return the settings that affect the data, besides the files."""
        return {}


def items_table(item_ids: Sequence[str], titles: Sequence[str], genres: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Create a table of items."""
    return pd.DataFrame({"item_id": list(item_ids), "title": list(titles), "genres": pd.Series(list(genres), dtype=object)})
