"""Table of all interactions with known items: user, item, time, rating, row in the source, and split that the source states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.sources.recommendation.base import InteractionTables

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
SPLITS = ("train", "val", "test")
NO_SPLIT = -1
SHOWN = 3  # maximum number of ids in a message
# Names of splits that tables of interactions may contain, and their numbers.
SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}


@dataclass(frozen=True)
class Events:
    """Interactions with known items, ordered by user, then by time, then by row in the source.

    The table is not filtered by rating or frequency. Filters select positions in these arrays. Shapes: E interactions.

    Attributes:
        users: Ids of the users in the source, in ascending order.
        user: ``(E,)`` position in ``users``.
        item: ``(E,)`` position in the catalogue.
        time: ``(E,)`` time in the unit of the source, usually seconds since 1970.
        rating: ``(E,)`` rating, or a label 0 or 1; ``nan`` if unknown.
        row: ``(E,)`` number of the row in the source, from 0.
        split: ``(E,)`` split that the source states: 0 train, 1 val, 2 test, -1 none.
        behavior: ``(E,)`` position in ``behaviors`` of the type of the interaction; -1 if it is unknown.
        behaviors: Types of interactions, e.g. view and purchase, in ascending order; empty if the source has none.
    """

    users: list[str]
    user: Ints
    item: Ints
    time: Floats
    rating: Floats
    row: Ints
    split: Ints
    behavior: Ints
    behaviors: list[str]

    def __len__(self) -> int:
        """Return the number of interactions."""
        return len(self.user)

    @classmethod
    def from_tables(cls, tables: InteractionTables, ids: list[int]) -> Events:
        """Order the interactions of a source.

        Args:
            tables: Tables of the source.
            ids: Catalogue position of each row of ``tables.items``; -1 for items without a title.

        Raises:
            ValueError: If there is no interaction, or if no interaction has a known item.
        """
        events = tables.interactions
        if not len(events):
            raise ValueError(f"{tables.origin}: the table of interactions has no row; give one row for each interaction")
        item = events["item_id"].map(dict(zip(tables.items["item_id"], ids, strict=True))).fillna(-1).to_numpy(np.int64)
        known = item >= 0
        if not known.any():
            raise ValueError(
                f"{tables.origin}: no item of the {len(item)} interactions is in the items table with a title (item_id "
                f"{events['item_id'].iloc[0]!r} in the interactions, {next(iter(tables.items['item_id']), None)!r} in the items); compare the "
                "columns item_id, and check whether titles are missing"
            )
        # Users are ordered by their ids, so that the order of the rows in the file only matters for equal times.
        codes, names = pd.factorize(events["user_id"][known], sort=True)
        user, time = codes.astype(np.int64), events["timestamp"].to_numpy(np.float64)[known]
        order = np.lexsort((time, user))  # stable
        rows = np.flatnonzero(known)[order]
        rating = events["rating"].to_numpy(np.float64)[rows] if "rating" in events else np.full(len(rows), np.nan)
        split = _split_numbers(events["split"].iloc[rows]) if "split" in events else np.full(len(rows), NO_SPLIT)
        behavior, behaviors = _number_texts(events["behavior"].iloc[rows]) if "behavior" in events else (np.full(len(rows), -1), [])
        return cls([str(name) for name in names], user[order], item[rows], time[order], rating, rows, split, behavior, behaviors)

    def renumber_items(self, new_numbers: Ints) -> Events:
        """Return the interactions with other numbers of items.

        Args:
            new_numbers: ``(N,)`` new number of each item; -1 drops its interactions.
        """
        item = new_numbers[self.item]
        kept = item >= 0
        columns = {name: getattr(self, name)[kept] for name in ("user", "time", "rating", "row", "split", "behavior")}
        return replace(self, item=item[kept], **columns)

    def of_user(self, user: int) -> slice:
        """Return the positions of the interactions of a user."""
        return slice(*np.searchsorted(self.user, [user, user + 1]))


def describe_dropped(tables: InteractionTables, ids: list[int]) -> list[str]:
    """Return a text for each cause that drops interactions because of their item, with their number and up to three ids.

    Args:
        tables: Tables of the source.
        ids: Catalogue position of each row of ``tables.items``; -1 for items without a title.
    """
    column, position = tables.interactions["item_id"], dict(zip(tables.items["item_id"], ids, strict=True))
    untitled = [key for key, item in position.items() if item < 0]
    causes = {
        "items that are not in the items table": column[~column.isin(list(position))],
        "items without a readable title": column[column.isin(untitled)],
    }
    return [f"{len(own):,} of {len(column):,} interactions with {cause} ({_examples(own)})" for cause, own in causes.items() if len(own)]


def describe_order(tables: InteractionTables) -> dict[str, str]:
    """Return texts about interactions that are repeated or not in the order of time, by name; empty if there are none."""
    events = tables.interactions
    earlier = int((events["timestamp"].groupby(events["user_id"], sort=False).diff() < 0).sum())
    repeated = int(events.duplicated(["user_id", "item_id", "timestamp"]).sum())
    texts = {
        "order": (earlier, f"{earlier:,} of {len(events):,} interactions are earlier than the user's previous row; interactions are sorted by time"),
        "repeated": (repeated, f"{repeated:,} of {len(events):,} interactions repeat user, item and time of an earlier row"),
    }
    return {name: text for name, (count, text) in texts.items() if count}


def _examples(keys: pd.Series) -> str:
    """Return the number of distinct ids, and the first ones."""
    distinct = list(dict.fromkeys(keys))
    return f"{len(distinct):,} distinct, e.g. {', '.join(map(brief_repr, distinct[:SHOWN]))}"


def first_of_each_item(events: Events, positions: Ints) -> Ints:
    """Return those of the positions in ``events`` that are a user's first interaction with an item, ``(M,)``."""
    repeated = pd.DataFrame({"user": events.user[positions], "item": events.item[positions]}).duplicated().to_numpy()
    first: Ints = positions[~repeated]
    return first


def k_core(users: Ints, items: Ints, min_user_events: int, min_item_events: int) -> NDArray[np.bool_]:
    """Return which interactions remain if users and items below their minimum are removed repeatedly until nothing changes.

    Args:
        users: ``(E,)`` user of each interaction.
        items: ``(E,)`` item of each interaction.
        min_user_events: Minimum number of interactions of a user.
        min_item_events: Minimum number of interactions of an item.

    Returns:
        ``(E,)`` bool.
    """
    keep = np.ones(len(users), dtype=bool)
    while True:
        enough = np.bincount(users[keep], minlength=users.max(initial=-1) + 1)[users] >= min_user_events
        enough &= np.bincount(items[keep], minlength=items.max(initial=-1) + 1)[items] >= min_item_events
        if not (keep & ~enough).any():
            return keep
        keep &= enough


def _number_texts(column: pd.Series) -> tuple[Ints, list[str]]:
    """Return the number of each text, -1 if it is missing or empty, and the distinct texts."""
    texts = column.map(lambda value: value.strip() or None if isinstance(value, str) else value)
    codes, names = pd.factorize(texts, sort=True)
    return codes.astype(np.int64), [str(name) for name in names]


def _split_numbers(names: pd.Series) -> Ints:
    folded = names.map(lambda name: name.strip().casefold() if isinstance(name, str) else name)
    numbers: Ints = folded.map(SPLIT_NAMES).fillna(NO_SPLIT).to_numpy(np.int64)
    return numbers
