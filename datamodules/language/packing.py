"""Whole histories packed into rows of one length: about fifty times more signal a second than one target per prompt."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from malleable.datamodules.sample_ids import Ints


class Window(NamedTuple):
    """Items ``start:end`` of a sequence, which make one document of ``length`` tokens."""

    sequence: int
    start: int
    end: int
    length: int


def cut_windows(sequences: Sequence[Ints], sizes: Ints, pack_length: int, overhead: int) -> list[Window]:
    """Cut sequences into documents that fit a row, between items.

    Args:
        sequences: Items of each sequence.
        sizes: Tokens of each item of the catalogue, its separator included.
        pack_length: Tokens of a row.
        overhead: Tokens of a document besides its items.

    Raises:
        ValueError: If a single item is longer than a row.
    """
    room = pack_length - overhead
    if sizes.max(initial=0) > room:
        raise ValueError(f"pack_length {pack_length} is shorter than the longest item with its markers ({overhead + sizes.max()} tokens); raise it")
    windows = []
    for sequence, items in enumerate(sequences):
        total = np.concatenate([[0], np.cumsum(sizes[items])])
        start = 0
        while start < len(items):
            end = int(np.searchsorted(total, total[start] + room, side="right")) - 1
            windows.append(Window(sequence, start, end, int(total[end] - total[start]) + overhead))
            start = end
    return windows


def fit(windows: Sequence[Window], pack_length: int) -> list[list[Window]]:
    """Lay documents into as few rows as may be: best fit, longest first."""
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
