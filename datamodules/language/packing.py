"""Packing of documents into rows of fixed length. Packed histories give about fifty times more targets per second than one target per prompt."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from malleable.datamodules.sample_ids import Ints


class Window(NamedTuple):
    """Items ``start:end`` of a sequence, as one document of ``length`` tokens."""

    sequence: int
    start: int
    end: int
    length: int


def split_sequences(sequences: Sequence[Ints], sizes: Ints, pack_length: int, overhead: int) -> list[Window]:
    """Split sequences between items into documents that fit into a row.

    Args:
        sequences: Items of each sequence.
        sizes: Number of tokens of each item of the catalogue, including its separator.
        pack_length: Number of tokens of a row.
        overhead: Number of tokens of a document besides its items.

    Raises:
        ValueError: If a single item does not fit into a row.
    """
    capacity = pack_length - overhead
    if sizes.max(initial=0) > capacity:
        raise ValueError(f"pack_length {pack_length} is less than the {overhead + sizes.max()} tokens of the longest item; increase pack_length")
    windows = []
    for sequence, items in enumerate(sequences):
        total = np.concatenate([[0], np.cumsum(sizes[items])])
        start = 0
        while start < len(items):
            end = int(np.searchsorted(total, total[start] + capacity, side="right")) - 1
            windows.append(Window(sequence, start, end, int(total[end] - total[start]) + overhead))
            start = end
    return windows


def pack_windows(windows: Sequence[Window], pack_length: int) -> list[list[Window]]:
    """Pack documents into rows with the best-fit-decreasing heuristic."""
    rows: list[list[Window]] = []
    space: list[tuple[int, int]] = []
    for window in sorted(windows, key=lambda window: (-window.length, window.sequence, window.start)):
        place = bisect_left(space, (window.length, -1))
        if place == len(space):
            rows.append([])
            free, row = pack_length, len(rows) - 1
        else:
            free, row = space.pop(place)
        rows[row].append(window)
        insort(space, (free - window.length, row))
    return rows
