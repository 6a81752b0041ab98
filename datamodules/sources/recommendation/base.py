"""What a source of recommendation data gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd


@dataclass(frozen=True)
class InteractionTables:
    """Events of users, to be split here.

    Attributes:
        interactions: Columns ``user_id`` and ``item_id`` (text), ``timestamp`` (float, seconds), and, where known, ``rating`` (float; a rating, or a
            label 0 or 1) and ``split`` (text: train, val or test). Of equal times, the order of the rows is the order in time.
        items: Columns ``item_id`` (text), ``title`` (text as given), ``genres`` (tuple of text).
        origin: Files of the tables, for messages.
        notes: What reading left out or changed, for the summary of the data.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    notes: tuple[str, ...] = ()
    origin: str = "the source"


class ReadyRow(NamedTuple):
    """A row whose split was decided by others; items are positions in :attr:`ReadyRows.items`, -1 where unknown.

    Attributes:
        history: Items before the target, oldest first.
        target: The true next item.
        candidates: Items to choose from, in the order given; empty for the whole catalogue.
    """

    history: Sequence[int]
    target: int
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class ReadyRows:
    """Rows with a ready split and no users.

    Attributes:
        items: As in :class:`InteractionTables`.
        rows: Rows by split: ``train``, ``val``, ``test``.
    """

    items: pd.DataFrame
    rows: dict[str, list[ReadyRow]] = field(default_factory=dict)


class Source(ABC):
    """Where interactions come from; subclasses state origin, terms and checksums in their docstring."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files the data is read from, fetching them where needed; their content identifies the data."""

    @abstractmethod
    def load(self) -> InteractionTables | ReadyRows:
        """Read the data."""

    def settings(self) -> dict[str, object]:
        """Return what besides the files decides the data."""
        return {}


def items_table(item_ids: Sequence[str], titles: Sequence[str], genres: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Make an items table."""
    return pd.DataFrame({"item_id": list(item_ids), "title": list(titles), "genres": pd.Series(list(genres), dtype=object)})
