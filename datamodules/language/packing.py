"""Whole histories packed into rows of one length: about fifty times more signal a second than one target per prompt."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from malleable.datamodules.batch import PackedExample
from malleable.datamodules.recommendation.prompt import PromptPieces
from malleable.datamodules.recommendation.splits import Ints


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


class PackedRows:
    """Rows of whole documents over histories, assembled at access.

    Documents of a single item have no history to learn from and are left out.

    Args:
        sequences: Items of each history, oldest first.
        pieces: The tokenised template and catalogue.
        pack_length: Tokens of a row.
    """

    def __init__(self, sequences: Sequence[Ints], pieces: PromptPieces, pack_length: int = 512) -> None:
        self.sequences = sequences
        self.pieces = pieces
        sizes = np.array([len(tokens) + len(pieces.separator) for tokens in pieces.items])
        # The first item has no separator before it, and the end-of-sequence token closes the document.
        overhead = len(pieces.prefix) - len(pieces.separator) + 1
        windows = cut_windows(sequences, sizes, pack_length, overhead)
        self.rows = fit([window for window in windows if window.end - window.start > 1], pack_length)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedExample:
        """Return a row; documents are numbered from 1."""
        input_ids: list[int] = []
        document_ids: list[int] = []
        for number, window in enumerate(self.rows[index], start=1):
            document = self.pieces.document(self.sequences[window.sequence][window.start : window.end].tolist())
            input_ids += document
            document_ids += [number] * len(document)
        return {"sample_id": index, "input_ids": input_ids, "document_ids": document_ids}

    def row_tokens(self) -> Ints:
        """Return the targets of each row: every token but the first of a document."""
        return np.array([sum(window.length - 1 for window in row) for row in self.rows], dtype=np.int64)
