"""From interactions to training, validation and test rows: filters, time order, leave-last-out and global-time splits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from malleable.datamodules.recommendation.summary import DataSummary, tied_share
from malleable.datamodules.recommendation.titles import clean_title, merge_titles
from malleable.datamodules.sample_ids import array_hash, content_ids, text_hashes
from malleable.datamodules.sources.recommendation.base import InteractionTables, ReadyRow, ReadyRows

log = logging.getLogger(__name__)

Ints = NDArray[np.integer[Any]]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """How interactions become rows.

    Attributes:
        kind: ``leave_last_out``: a user's last item is for the test, the one before it for validation. Of items with equal times the one
            further down in the file is the later one.
            ``global_time``: rows are cut by the time of their target, so that nothing later trains.
        min_rating: Keep interactions rated at least so; ``None`` keeps all.
        min_user_events: Keep users with at least so many interactions.
        min_item_events: Keep items with at least so many; with both at k this is the k-core, applied until nothing changes.
            At 1 (the default) items without any interaction stay in the catalogue.
        history_length: Items that a row shows, at most.
        fractions: Shares of training, validation and test rows under ``global_time``.
        repeats: ``drop`` keeps a user's first interaction with an item, and what was seen is not recommended again;
            ``keep`` keeps them all, and everything may be recommended again.
        candidates: Items a row offers to choose from, the target among them, the others drawn from the unseen; ``None``: the catalogue.
        train_limit: Draw at most so many training rows.
        val_limit: Draw at most so many validation rows.
        test_limit: Draw at most so many test rows.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: Literal["leave_last_out", "global_time"] = "leave_last_out"
    min_rating: float | None = None
    min_user_events: int = 5
    min_item_events: int = 1
    history_length: int = 10
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    repeats: Literal["drop", "keep"] = "drop"
    candidates: int | None = None
    train_limit: int | None = None
    val_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("min_user_events", "min_item_events", "history_length", "train_limit", "val_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.candidates is not None and self.candidates < 2:
            raise ValueError(f"candidates must be >= 2 (the target and another), got {self.candidates}")
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be three shares >= 0 that sum to 1, got {tuple(self.fractions)}")


@dataclass
class RowIndex:
    """Rows of one split: row i shows ``items[start:end]`` of its sequence and asks for ``items[end]``.

    Attributes:
        sequence: ``(N,)`` index of the sequence.
        end: ``(N,)`` position of the target.
        candidates: Per row the items to choose from; ``None`` for the whole catalogue.
    """

    sequence: Ints
    end: Ints
    candidates: Sequence[Ints] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sequence)


@dataclass
class Interactions:
    """Filtered data in its final order; item ids are positions in ``titles``.

    Attributes:
        titles: Clean, distinct titles.
        genres: Genres of each item.
        keys: The source's own ids of each item; several where equal titles were merged.
        sequences: Items of each user (or ready row), oldest first.
        train_end: ``(sequences,)`` number of leading items that belong to training.
        rows: Rows by split.
        users: The source's id of the user of each sequence; empty for ready rows.
        times: Times of the items of each sequence; empty for ready rows.
        summary: What filters and cleaning left.
    """

    titles: list[str]
    genres: list[tuple[str, ...]]
    keys: list[list[str]]
    sequences: list[Ints]
    train_end: Ints
    rows: dict[str, RowIndex] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)
    times: list[NDArray[np.float64]] = field(default_factory=list)
    summary: DataSummary = field(default_factory=DataSummary)

    def sample_ids(self) -> dict[str, Ints]:
        """Return the ids of the rows of each split: hashes of user, title and time; of ready rows, of the titles that they show and ask for."""
        titles = text_hashes(self.titles)
        rows = [(self.rows[name].sequence, self.rows[name].end) for name in self.rows]
        sequence, end = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        starts = np.cumsum([0, *map(len, self.sequences)])
        target = titles[np.concatenate(self.sequences)[starts[sequence] + end]]
        if self.users:
            ids = content_ids(text_hashes(self.users)[sequence], target, np.concatenate(self.times)[starts[sequence] + end])
        else:
            shown = np.array([array_hash(titles[items]) for items in self.sequences], dtype=np.uint64)
            ids = content_ids(shown[sequence], target)
        parts = np.split(ids, np.cumsum([len(self.rows[name]) for name in self.rows])[:-1])
        return dict(zip(self.rows, parts, strict=True))

    def popularity(self) -> Ints:
        """Count the training interactions of each item."""
        events = [items[:end] for items, end in zip(self.sequences, self.train_end, strict=True)]
        return np.bincount(np.concatenate(events), minlength=len(self.titles))


def prepare(source: InteractionTables | ReadyRows, split: Split) -> Interactions:
    """Clean titles, filter, order and split.

    Raises:
        ValueError: If no interaction or no row is left, or ratings are asked for where there are none.
    """
    data = _from_rows(source, split) if isinstance(source, ReadyRows) else _from_tables(source, split)
    if not any(map(len, data.rows.values())):
        raise ValueError(f"no row is left: every history has fewer than two usable items; check the data and {split}")
    data.summary.describe_genres(data.genres)
    return data


def k_core(users: Ints, items: Ints, min_user_events: int, min_item_events: int) -> NDArray[np.bool_]:
    """Return which interactions stay when users and items below their minimum go, until nothing changes."""
    keep = np.ones(len(users), dtype=bool)
    while True:
        enough = np.bincount(users[keep], minlength=users.max(initial=-1) + 1)[users] >= min_user_events
        enough &= np.bincount(items[keep], minlength=items.max(initial=-1) + 1)[items] >= min_item_events
        if not (keep & ~enough).any():
            return keep
        keep &= enough


def _clean_items(items: pd.DataFrame, summary: DataSummary) -> tuple[list[str], list[tuple[str, ...]], list[list[str]], list[int]]:
    """Clean and merge titles: titles, genres and source ids of the catalogue, and the catalogue id of each row (-1: dropped)."""
    cleaned = [clean_title(title) for title in items["title"]]
    titles, ids = merge_titles(cleaned)
    if dropped := ids.count(-1):
        log.warning("dropped %d items without a readable title", dropped)
    genres: list[tuple[str, ...]] = [()] * len(titles)
    keys: list[list[str]] = [[] for _ in titles]
    for index, key, own in zip(ids, items["item_id"], items["genres"], strict=True):
        if index >= 0:
            genres[index] = tuple(dict.fromkeys([*genres[index], *own]))
            keys[index].append(key)
    summary.describe_items(list(items["title"]), cleaned, keys, titles)
    return titles, genres, keys, ids


def _from_tables(tables: InteractionTables, split: Split) -> Interactions:
    summary = DataSummary()
    titles, genres, keys, ids = _clean_items(tables.items, summary)
    summary.facts |= {"source": "; ".join(tables.notes)} if tables.notes else {}
    names, user, item, time = _ordered_events(tables, ids, split, summary)
    keep = k_core(user, item, split.min_user_events, split.min_item_events)
    if not keep.any():
        raise ValueError(
            f"no interaction is left with min_rating={split.min_rating}, min_user_events={split.min_user_events} "
            f"and min_item_events={split.min_item_events} out of {len(tables.interactions)}; lower them"
        )
    user, item, time = user[keep], item[keep], time[keep]
    summary.count(f"min_user_events {split.min_user_events}, min_item_events {split.min_item_events}", user)
    summary.describe_times(time)
    if split.min_item_events > 1:
        kept = np.unique(item)
        titles, genres, keys = [titles[i] for i in kept], [genres[i] for i in kept], [keys[i] for i in kept]
        item = np.searchsorted(kept, item)
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    sequences, times = np.split(item, starts[1:]), np.split(time, starts[1:])
    users = [str(names[position]) for position in user[starts]]
    data = Interactions(titles, genres, keys, sequences, np.zeros(len(sequences), dtype=np.int64), users=users, times=times, summary=summary)
    if split.kind == "leave_last_out":
        _leave_last_out(data)
    else:
        _global_time(data, times, split.fractions)
    summary.describe_ties({name: tied_share(time, starts, data.rows[name].sequence, data.rows[name].end) for name in ("val", "test")})
    return data


def _ordered_events(
    tables: InteractionTables, ids: list[int], split: Split, summary: DataSummary
) -> tuple[Sequence[str], Ints, Ints, NDArray[np.float64]]:
    """Return user ids, and user, item and time of the rated, known interactions, by user, then time, then row of the file."""
    events = tables.interactions
    summary.count("read", events["user_id"])
    if split.min_rating is not None:
        if "rating" not in events:
            raise ValueError(f"min_rating={split.min_rating} needs ratings, but the interactions have no rating; leave min_rating out")
        events = events[events["rating"] >= split.min_rating]
        summary.count(f"rated >= {split.min_rating:g}", events["user_id"])
    item = events["item_id"].map(dict(zip(tables.items["item_id"], ids, strict=True))).fillna(-1).to_numpy(np.int64)
    known = item >= 0
    if unknown := int((~known).sum()):
        log.warning("dropped %d of %d interactions with items that are not in the items table or have no title", unknown, len(item))
    # Users in order of their own id, so that the order of the file decides nothing but ties in time.
    codes, names = pd.factorize(events["user_id"][known], sort=True)
    user, item, time = codes.astype(np.int64), item[known], events["timestamp"].to_numpy(np.float64)[known]
    summary.count("of known items", user)
    order = np.lexsort((time, user))  # stable
    user, item, time = user[order], item[order], time[order]
    if split.repeats == "drop":
        first = ~pd.DataFrame({"user": user, "item": item}).duplicated().to_numpy()
        user, item, time = user[first], item[first], time[first]
        summary.count("first of a user and item", user)
    return names, user, item, time


def _leave_last_out(data: Interactions) -> None:
    lengths = np.array([len(items) for items in data.sequences])
    # A user with two items trains nothing but can be tested; one item gives no row at all.
    data.train_end = np.maximum(lengths - 2, 0)
    data.rows["train"] = _rows_between(np.ones_like(lengths), data.train_end)
    for name, back in (("val", 2), ("test", 1)):
        own = np.flatnonzero(lengths > back)
        data.rows[name] = RowIndex(own, lengths[own] - back)


def _global_time(data: Interactions, times: list[NDArray[np.float64]], fractions: Sequence[float]) -> None:
    targets = np.sort(np.concatenate([time[1:] for time in times]))
    cuts = []
    for share in np.cumsum(fractions)[:2]:
        position = round(share * len(targets))
        # Equal times stay on one side, so that nothing trains that happens together with a test.
        cuts.append(targets[position] if position < len(targets) else np.inf)
    lengths = np.array([len(time) for time in times])
    bounds = [np.ones_like(lengths), *(np.array([np.searchsorted(time, cut, "left") for time in times]) for cut in cuts), lengths]
    data.train_end = bounds[1]
    for index, name in enumerate(SPLITS):
        data.rows[name] = _rows_between(np.maximum(bounds[index], 1), bounds[index + 1])


def _rows_between(first: Ints, last: Ints) -> RowIndex:
    """Rows for the targets ``first <= position < last`` of every sequence."""
    counts = np.maximum(last - first, 0)
    sequence = np.repeat(np.arange(len(first)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return RowIndex(sequence, first[sequence] + offset)


def _from_rows(ready: ReadyRows, split: Split) -> Interactions:
    summary = DataSummary()
    titles, genres, keys, ids = _clean_items(ready.items, summary)
    data = Interactions(titles, genres, keys, [], np.zeros(0, dtype=np.int64), summary=summary)
    train_end: list[int] = []
    for name in SPLITS:
        rows = _map_items(name, ready.rows.get(name, []), ids)
        kept = _usable(name, rows, split)
        first = len(data.sequences)
        data.sequences += [np.array([*row.history, row.target], dtype=np.int64) for row in kept]
        train_end += [len(row.history) + 1 if name == "train" else 0 for row in kept]
        candidates = [np.array(row.candidates, dtype=np.int64) for row in kept]
        data.rows[name] = RowIndex(
            np.arange(first, len(data.sequences)),
            np.array([len(row.history) for row in kept], dtype=np.int64),
            candidates if any(len(row) for row in candidates) else None,
        )
    data.train_end = np.array(train_end, dtype=np.int64)
    return data


def _map_items(name: str, rows: list[ReadyRow], ids: list[int]) -> list[ReadyRow]:
    """Put catalogue ids for the source's positions; what has none is left out of histories and candidates, counted and logged."""
    catalogue = [*ids, -1]  # position -1, an unknown item, stays -1

    def known(positions: Sequence[int]) -> list[int]:
        return [item for position in positions if (item := catalogue[position]) >= 0]

    mapped = [ReadyRow(known(row.history), catalogue[row.target], known(row.candidates)) for row in rows]
    for part in ("history", "candidates"):
        if lost := sum(len(getattr(row, part)) for row in rows) - sum(len(getattr(row, part)) for row in mapped):
            log.warning("left out %d items of %s rows' %s that are not in the catalogue", lost, name, part)
    return mapped


def _usable(name: str, rows: list[ReadyRow], split: Split) -> list[ReadyRow]:
    """Drop, count and log the rows that cannot be used."""
    known = [row for row in rows if row.target >= 0]
    if unknown := len(rows) - len(known):
        log.warning("dropped %d of %d %s rows: their target is not in the catalogue", unknown, len(rows), name)
    shown = [row for row in known if len(row.history)]
    if empty := len(known) - len(shown):
        log.warning("dropped %d of %d %s rows without any history", empty, len(rows), name)
    if split.repeats == "keep":
        return shown
    fresh = [row for row in shown if row.target not in row.history]
    if repeated := len(shown) - len(fresh):
        log.warning("dropped %d of %d %s rows: their target is in their history (repeats: keep retains them)", repeated, len(rows), name)
    return fresh
