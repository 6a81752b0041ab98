"""Datasets of items for sequence models: training rows of parts of histories, and rows to rank items for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.batch import SequenceBatch, SequenceExample
from malleable.datamodules.collate import collate_sequences
from malleable.datamodules.language.packing import Window, pack_windows
from malleable.datamodules.recommendation.rows import AnswerRows, RowTable
from malleable.datamodules.recommendation.splits import Ints
from malleable.datamodules.sample_ids import array_hash, content_ids, keyed_hashes


@dataclass
class SequenceColumns:
    """Histories with times and types of interactions.

    Attributes:
        items: Items of each history, oldest first.
        times: Time of each item; ``None`` if the source has no times.
        behaviors: Type of each interaction; ``None`` if the source has none.
    """

    items: Sequence[Ints]
    times: Sequence[NDArray[np.float64]] | None = None
    behaviors: Sequence[Ints] | None = None

    def take(self, indices: Sequence[int]) -> SequenceColumns:
        """Return the histories at the given positions."""
        columns = (self.items, self.times, self.behaviors)
        return SequenceColumns(*(None if column is None else [column[index] for index in indices] for column in columns))  # type: ignore[arg-type]

    def part(self, sequence: int, start: int, end: int) -> dict[str, Any]:
        """Return items ``start:end`` of a history as fields of a row."""
        columns = {"items": self.items, "times": self.times, "behaviors": self.behaviors}
        return {name: column[sequence][start:end] for name, column in columns.items() if column is not None}


class SequenceRows:
    """Training rows: parts of histories, each with all its targets.

    The targets are those of the rows of ``table``, so that limits and omitted rows of a split have the same effect as on rows with one target.
    A history with more than ``max_length`` + 1 items is split into parts of this length that overlap by half of it. Each target contributes in one
    part only, where at least half of ``max_length`` items are before it. Items after the last target of a part are omitted.

    Args:
        columns: The histories.
        table: Rows with one target each, in any order.
        select: Positions in ``table`` of the rows to use.
        titles: ``(N,)`` hashes of the titles, for the ids of the rows.
        max_length: Maximum number of items before a target.
        pack_length: Number of items of a row that several parts are packed into; ``None``: one part a row.

    Raises:
        ValueError: If a part does not fit into a packed row.
    """

    def __init__(
        self, columns: SequenceColumns, table: RowTable, select: Ints, titles: NDArray[np.uint64], max_length: int, pack_length: int | None = None
    ) -> None:
        if pack_length is not None and pack_length <= max_length:
            raise ValueError(
                f"pack_length {pack_length} must be larger than the {max_length} items before a target (split.sequence_length); change one of them"
            )
        self.columns = columns
        self._overlap = max_length // 2
        self._packed = pack_length is not None
        order = np.lexsort((table.end, table.sequence))
        self._sequence, self._end = table.sequence[order], table.end[order]
        self._selected = np.isin(order, select)
        first = np.flatnonzero(np.diff(self._sequence, prepend=-1))
        # Parts do not depend on the selection, so that an omitted target does not change the ids of rows.
        windows = [
            window
            for start, stop in zip(first.tolist(), [*first[1:].tolist(), len(order)], strict=True)
            for window in _windows(int(self._sequence[start]), self._end[start:stop], max_length, self._overlap)
        ]
        kept = [window for window in windows if self._selected[self._own_rows(window)].any()]
        ids = table.sample_id[order]
        if pack_length is None:
            self.rows = [[window] for window in kept]
        else:
            # In a random order, a packed row has parts of different users and lengths: similar targets in one step make training less accurate.
            self.rows = pack_windows(
                kept, pack_length, keyed_hashes(np.array([ids[self._own_rows(window).start] for window in kept], dtype=np.int64))
            )
        contents = np.array([array_hash(np.concatenate([titles[self._items(window)] for window in row])) for row in self.rows], dtype=np.uint64)
        # The id of the first target tells apart equal histories of several users.
        self.sample_ids = content_ids(contents, np.array([ids[self._own_rows(row[0]).start] for row in self.rows], dtype=np.int64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> SequenceExample:
        """Return a row; packed parts are numbered from 1."""
        windows = self.rows[index]
        parts = [self.columns.part(window.sequence, window.start, window.end) for window in windows]
        row: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        row["supervised"] = np.concatenate([self._supervised(window) for window in windows])
        if self._packed:
            row["document_ids"] = np.repeat(np.arange(1, len(windows) + 1), [window.length for window in windows])
        return cast("SequenceExample", {"sample_id": int(self.sample_ids[index]), **row})

    def collate(self, rows: Sequence[SequenceExample]) -> SequenceBatch:
        """Collate rows to a batch."""
        return collate_sequences(rows)

    def row_tokens(self) -> Ints:
        """Return the number of targets of each row."""
        return np.array([sum(len(self._own_targets(window)) for window in row) for row in self.rows], dtype=np.int64)

    def _items(self, window: Window) -> Ints:
        items: Ints = self.columns.items[window.sequence][window.start : window.end]
        return items

    def _own_rows(self, window: Window) -> slice:
        """Return the positions in the sorted table of the targets of a part; those that overlap with the previous part are targets of the latter."""
        first, last = np.searchsorted(self._sequence, [window.sequence, window.sequence + 1])
        own = self._end[first:last]
        before = window.start + self._overlap if window.start else 0
        return slice(int(first + np.searchsorted(own, before, "right")), int(first + np.searchsorted(own, window.end, "left")))

    def _own_targets(self, window: Window) -> Ints:
        """Return the positions in the history of the selected targets of a part."""
        rows = self._own_rows(window)
        targets: Ints = self._end[rows][self._selected[rows]]
        return targets

    def _supervised(self, window: Window) -> NDArray[np.bool_]:
        marks = np.zeros(window.length, dtype=bool)
        marks[self._own_targets(window) - window.start] = True
        return marks


def _windows(sequence: int, ends: Ints, max_length: int, overlap: int) -> list[Window]:
    """Return the parts of a history that contain its targets, at the positions ``ends`` in ascending order."""
    windows = []
    for start in range(0, int(ends[-1]), max_length - overlap):
        first = start + overlap if start else 0
        inside = ends[(ends > first) & (ends <= start + max_length)]
        if len(inside):
            windows.append(Window(sequence, start, int(inside[-1]) + 1, int(inside[-1]) + 1 - start))
    return windows


class SequenceQueries(AnswerRows):
    """Rows to rank items for: the last items of a history, and the true next item.

    Args:
        columns: The histories that the rows of the table belong to.
        rows: Rows without text, whose items, candidates and filters are used.
    """

    def __init__(self, columns: SequenceColumns, rows: AnswerRows) -> None:
        vars(self).update(vars(rows))
        self.columns = columns

    def __getitem__(self, index: int) -> Any:
        """Return a row."""
        example = super().__getitem__(index)
        row = self.select[index]
        end = int(self.table.end[row])
        start = max(0, end - self.lengths.sequence) if self.lengths is not None else int(self.table.start[row])
        query: dict[str, Any] = {
            "sample_id": example["sample_id"],
            "target": example["item_ids"][0],
            "seen": example["seen"],
            **self.columns.part(int(self.table.sequence[row]), start, end),
        }
        return query | {name: example[name] for name in ("metric_history", "candidates") if name in example}

    def collate(self, rows: Sequence[Any]) -> Any:
        """Collate rows to a :class:`SequenceBatch`."""
        return collate_sequences(rows)
