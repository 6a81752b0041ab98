"""Filters and splits of interactions: cleaning, filters by rating and frequency, order in time, and rows for training, validation and test."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from malleable.datamodules.recommendation.events import NO_SPLIT, SPLITS, Events, describe_dropped, describe_order, first_of_each_item, k_core
from malleable.datamodules.recommendation.summary import DataSummary, tied_share
from malleable.datamodules.recommendation.titles import clean_title, merge_titles
from malleable.datamodules.sample_ids import array_hash, content_ids, text_hashes
from malleable.datamodules.sources.recommendation.base import InteractionTables, ReadyRow, ReadyRows

log = logging.getLogger(__name__)

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Split:
    """Settings of filters and of the split into training, validation and test rows.

    Attributes:
        kind: ``leave_last_out``: the last item of each user is the test target, and the item before it the validation target; of items with equal
            times, the item in a later row of the file is the later one. ``global_time``: rows are split by the time of their targets, so that no
            training row is later than a test row. ``given``: the source has a split for each interaction: train, val or test.
        min_rating: Minimum rating of interactions; interactions without a rating are left out. ``None`` keeps all.
        min_user_events: Minimum number of interactions of a user.
        min_item_events: Minimum number of interactions of an item. Both minimums are applied until nothing changes (k-core). With 1, items without
            interactions stay in the catalogue.
        history_length: Maximum number of items in a prompt.
        sequence_length: Maximum number of items before the target that sequence models and counting baselines read; ``None``: ``history_length``.
        metric_length: Maximum number of items before the target that metrics count as the user's history (MGU, DGU); ``None``: ``history_length``.
        fractions: Shares of training, validation and test rows with ``global_time``.
        repeats: ``drop``: keep only the first interaction of a user with an item, and do not recommend seen items again. ``keep``: keep all
            interactions, and allow all items to be recommended again.
        candidates: Number of items to choose from in each row: the target and randomly sampled unseen items. ``None``: the whole catalogue.
        train_limit: Maximum number of training rows, which are sampled randomly.
        train_without: Text file with the ``sample_id`` of training rows to omit, one on each line. Other rows do not change, so that a model can be
            trained from scratch without these rows. Not supported with ``train_view: packed``. With ``packed_sequence``, an omitted row changes the
            packing of others if no target of its part of a history remains.
        val_limit: Maximum number of validation rows, which are sampled randomly.
        test_limit: Maximum number of test rows, which are sampled randomly.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: Literal["leave_last_out", "global_time", "given"] = "leave_last_out"
    min_rating: float | None = None
    min_user_events: int = 5
    min_item_events: int = 1
    history_length: int = 10
    sequence_length: int | None = None
    metric_length: int | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    repeats: Literal["drop", "keep"] = "drop"
    candidates: int | None = None
    train_limit: int | None = None
    train_without: str | None = None
    val_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        limits = (
            "min_user_events",
            "min_item_events",
            "history_length",
            "sequence_length",
            "metric_length",
            "train_limit",
            "val_limit",
            "test_limit",
        )
        for name in limits:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.candidates is not None and self.candidates < 2:
            raise ValueError(f"candidates must be >= 2 (the target and at least one other item), got {self.candidates}")
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be three shares >= 0 with a sum of 1, got {tuple(self.fractions)}")


@dataclass
class RowIndex:
    """Rows of one split. With ``items = sequences[sequence]``, the true answer of a row is ``items[end]``, and its history is ``items[:end]``.

    Attributes:
        sequence: ``(N,)`` index of the history in the ``sequences`` that the rows belong to.
        end: ``(N,)`` position of the target in its sequence.
        candidates: Items to choose from, for each row; ``None`` for the whole catalogue.
    """

    sequence: Ints
    end: Ints
    candidates: Sequence[Ints] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sequence)


@dataclass
class Interactions:
    """Filtered and split data. Item ids are positions in ``titles``.

    Attributes:
        titles: Cleaned, distinct titles.
        genres: Genres of each item.
        keys: Ids of each item in the source; several if items with equal titles were merged.
        sequences: Items of each user or ready row, oldest first.
        train_end: ``(S,)`` number of leading items of each of the S sequences that belong to training.
        rows: Rows by split.
        events: All interactions with known items; ``None`` for ready rows.
        positions: Positions in ``events`` of the items of each sequence; empty for ready rows.
        listed: ``(N,)`` whether the source has the item; an aligned catalogue may have more items. ``None``: all items.
        summary: Counts and warnings of filtering and cleaning.
    """

    titles: list[str]
    genres: list[tuple[str, ...]]
    keys: list[list[str]]
    sequences: list[Ints]
    train_end: Ints
    rows: dict[str, RowIndex] = field(default_factory=dict)
    events: Events | None = None
    positions: list[Ints] = field(default_factory=list)
    listed: NDArray[np.bool_] | None = None
    summary: DataSummary = field(default_factory=DataSummary)

    @property
    def user(self) -> Ints:
        """Position of the user of each sequence in the users of ``events``; empty for ready rows."""
        return np.array([self.events.user[own[0]] for own in self.positions], dtype=np.int64) if self.events is not None else np.zeros(0, np.int64)

    @property
    def users(self) -> list[str]:
        """Id of the user of each sequence in the source; empty for ready rows."""
        return [self.events.users[user] for user in self.user] if self.events is not None else []

    @property
    def times(self) -> list[NDArray[np.float64]]:
        """Times of the items of each sequence; empty for ready rows."""
        return [self.events.time[own] for own in self.positions] if self.events is not None else []

    def sample_ids(self) -> dict[str, Ints]:
        """Return the ids of the rows of each split: hashes of user, target title and time; for ready rows, hashes of all titles of the row."""
        titles = text_hashes(self.titles)
        rows = [(self.rows[name].sequence, self.rows[name].end) for name in self.rows]
        sequence, end = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        starts = np.cumsum([0, *map(len, self.sequences)])
        target = titles[np.concatenate(self.sequences)[starts[sequence] + end]]
        if self.events is not None:
            ids = content_ids(text_hashes(self.users)[sequence], target, np.concatenate(self.times)[starts[sequence] + end])
        else:
            contents = np.array([array_hash(titles[items]) for items in self.sequences], dtype=np.uint64)
            ids = content_ids(contents[sequence], target)
        parts = np.split(ids, np.cumsum([len(self.rows[name]) for name in self.rows])[:-1])
        return dict(zip(self.rows, parts, strict=True))

    def popularity(self) -> Ints:
        """Return the number of training interactions of each item, ``(N,)``."""
        events = [items[:end] for items, end in zip(self.sequences, self.train_end, strict=True)]
        return np.bincount(np.concatenate(events), minlength=len(self.titles))


def prepare(source: InteractionTables | ReadyRows, split: Split) -> Interactions:
    """Clean titles, and filter, order and split the data of a source.

    Raises:
        ValueError: If no interaction or no row remains, or if a minimum rating is set for data without ratings.
    """
    data = _from_rows(source, split) if isinstance(source, ReadyRows) else _from_tables(source, split)
    if not any(map(len, data.rows.values())):
        raise ValueError(f"no row remains: every history has fewer than two usable items; check the data and {split}")
    data.summary.describe_genres(data.genres)
    return data


def _clean_items(items: pd.DataFrame, summary: DataSummary) -> tuple[list[str], list[tuple[str, ...]], list[list[str]], list[int]]:
    """Clean titles and merge equal ones; return titles, genres and source ids of the items, and the item of each row of the table (-1: dropped)."""
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
    events = Events.from_tables(tables, ids)
    summary.facts |= describe_order(tables)
    if dropped := describe_dropped(tables, ids):
        summary.facts["dropped"] = "; ".join(dropped)
        for text in dropped:
            log.warning("dropped %s", text)
    chosen = _filter(events, tables, split, summary)
    if split.min_item_events > 1:
        kept = np.unique(events.item[chosen])
        titles, genres, keys = [titles[i] for i in kept], [genres[i] for i in kept], [keys[i] for i in kept]
        new_numbers = np.full(len(ids), -1)
        new_numbers[kept] = np.arange(len(kept))
        # Interactions with removed items are dropped, so that the positions of the others change.
        new_positions = np.cumsum(new_numbers[events.item] >= 0) - 1
        events, chosen = events.renumber_items(new_numbers), new_positions[chosen]
    user, time = events.user[chosen], events.time[chosen]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    positions = np.split(chosen, starts[1:])
    sequences = [events.item[own] for own in positions]
    data = Interactions(
        titles, genres, keys, sequences, np.zeros(len(sequences), dtype=np.int64), events=events, positions=positions, summary=summary
    )
    summary.count_short([len(items) for items in sequences])
    _SPLITTERS[split.kind](data, split)
    summary.describe_ties({name: tied_share(time, starts, data.rows[name].sequence, data.rows[name].end) for name in ("val", "test")})
    return data


def _filter(events: Events, tables: InteractionTables, split: Split, summary: DataSummary) -> Ints:
    """Return the positions of the interactions that pass the filters.

    Raises:
        ValueError: If no interaction passes, or if a minimum rating is set and there are no ratings.
    """
    given = tables.interactions
    summary.count("read", given["user_id"])
    if "rating" in given and (unrated := int(given["rating"].isna().sum())):
        summary.facts["ratings"] = f"{unrated:,} rows without a rating {'kept' if split.min_rating is None else 'left out (min_rating)'}"
    positions: Ints = np.arange(len(events))
    if split.min_rating is not None:
        if "rating" not in given:
            raise ValueError(f"{tables.origin}: min_rating={split.min_rating} needs ratings, but the interactions have no rating; omit min_rating")
        summary.count("with a rating", given["user_id"][given["rating"].notna()])
        summary.count(f"rated >= {split.min_rating:g}", given["user_id"][given["rating"] >= split.min_rating])
        positions = positions[events.rating >= split.min_rating]
        if not len(positions):
            ratings = events.rating[~np.isnan(events.rating)]
            between = f"between {ratings.min():g} and {ratings.max():g}" if len(ratings) else "missing"
            raise ValueError(
                f"{tables.origin}: none of {len(events)} interactions has a rating >= min_rating={split.min_rating:g}: ratings are {between}; "
                "decrease min_rating"
            )
    summary.count("of known items", events.user[positions])
    if split.repeats == "drop":
        positions = first_of_each_item(events, positions)
        summary.count("first of a user and item", events.user[positions])
    kept = positions[k_core(events.user[positions], events.item[positions], split.min_user_events, split.min_item_events)]
    if not len(kept):
        raise ValueError(
            f"{tables.origin}: none of {len(positions)} interactions of {len(np.unique(events.user[positions]))} users remains with "
            f"min_user_events={split.min_user_events} and min_item_events={split.min_item_events}; decrease them"
        )
    summary.count(f"min_user_events {split.min_user_events}, min_item_events {split.min_item_events}", events.user[kept])
    summary.describe_times(events.time[kept])
    return kept


def _leave_last_out(data: Interactions, split: Split) -> None:
    del split
    lengths = np.array([len(items) for items in data.sequences])
    # A user with two items has a test row, but no training row. A user with one item has no row.
    data.train_end = np.maximum(lengths - 2, 0)
    data.rows["train"] = _rows_between(np.ones_like(lengths), data.train_end)
    for name, back in (("val", 2), ("test", 1)):
        own = np.flatnonzero(lengths > back)
        data.rows[name] = RowIndex(own, lengths[own] - back)


def _global_time(data: Interactions, split: Split) -> None:
    times = data.times
    targets = np.sort(np.concatenate([time[1:] for time in times]))
    cuts = []
    for share in np.cumsum(split.fractions)[:2]:
        position = round(share * len(targets))
        # Targets with equal times are in the same split, so that no training target has the time of a test target.
        cuts.append(targets[position] if position < len(targets) else np.inf)
    lengths = np.array([len(time) for time in times])
    bounds = [np.ones_like(lengths), *(np.array([np.searchsorted(time, cut, "left") for time in times]) for cut in cuts), lengths]
    data.train_end = bounds[1]
    for index, name in enumerate(SPLITS):
        data.rows[name] = _rows_between(np.maximum(bounds[index], 1), bounds[index + 1])


def _given(data: Interactions, split: Split) -> None:
    """Assign rows to the split that the source has for their targets.

    Raises:
        ValueError: If an interaction has no split, or if the splits of a user are not in the order train, val, test.
    """
    del split
    assert data.events is not None
    lengths = np.array([len(items) for items in data.sequences])
    positions = np.concatenate(data.positions)
    given = data.events.split[positions]
    if (missing := given == NO_SPLIT).any():
        raise ValueError(
            f"kind='given' needs a split (train, val or test) for each interaction, but {int(missing.sum())} of {len(given)} have none (first: data "
            f"row {data.events.row[positions[missing.argmax()]] + 1}); complete the column split, or choose leave_last_out or global_time"
        )
    first = np.cumsum(lengths) - lengths
    # Whether the split of an interaction precedes the split of the user's previous interaction.
    earlier = np.append(False, given[1:] < given[:-1])
    earlier[first] = False
    if earlier.any():
        position = positions[earlier.argmax()]
        raise ValueError(
            f"user {data.events.users[data.events.user[position]]!r} has a {SPLITS[data.events.split[position]]} interaction (data row "
            f"{data.events.row[position] + 1}) after a {SPLITS[given[earlier.argmax() - 1]]} interaction: with kind='given', the splits of a user "
            "must be in the order train, val, test; choose leave_last_out or global_time"
        )
    counts = [np.add.reduceat(given == number, first) for number in range(len(SPLITS))]
    data.train_end = counts[0]
    bounds = np.cumsum([np.zeros_like(lengths), *counts], axis=0)
    for number, name in enumerate(SPLITS):
        data.rows[name] = _rows_between(np.maximum(bounds[number], 1), bounds[number + 1])


_SPLITTERS = {"leave_last_out": _leave_last_out, "global_time": _global_time, "given": _given}


def _rows_between(first: Ints, last: Ints) -> RowIndex:
    """Return rows for the targets at ``first <= position < last`` of every sequence."""
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
    """Convert positions in the source's table to items; omit unknown items from histories and candidates, and log their number."""
    catalogue = [*ids, -1]  # position -1 means an unknown item and is converted to -1

    def known(positions: Sequence[int]) -> list[int]:
        return [item for position in positions if (item := catalogue[position]) >= 0]

    mapped = [ReadyRow(known(row.history), catalogue[row.target], known(row.candidates)) for row in rows]
    for part in ("history", "candidates"):
        if lost := sum(len(getattr(row, part)) for row in rows) - sum(len(getattr(row, part)) for row in mapped):
            log.warning("omitted %d items in the %s of %s rows that are not in the catalogue", lost, part, name)
    return mapped


def _usable(name: str, rows: list[ReadyRow], split: Split) -> list[ReadyRow]:
    """Return the rows that can be used, and log the number of dropped rows."""
    known = [row for row in rows if row.target >= 0]
    if unknown := len(rows) - len(known):
        log.warning("dropped %d of %d %s rows: their target is not in the catalogue", unknown, len(rows), name)
    nonempty = [row for row in known if len(row.history)]
    if empty := len(known) - len(nonempty):
        log.warning("dropped %d of %d %s rows without any history", empty, len(rows), name)
    if split.repeats == "keep":
        return nonempty
    new_targets = [row for row in nonempty if row.target not in row.history]
    if repeated := len(nonempty) - len(new_targets):
        log.warning("dropped %d of %d %s rows: their target is in their history (set repeats: keep to use these rows)", repeated, len(rows), name)
    return new_targets
