"""Packing of documents into rows of fixed length. Packed histories give about fifty times more targets per second than one target per prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from malleable.datamodules.batch import PackedBatch, PackedExample
from malleable.datamodules.collate import collate
from malleable.datamodules.sample_ids import Hashes, Ints


class Window(NamedTuple):
    """Items ``start:end`` of a sequence, as one document.

    Attributes:
        sequence: Index of the sequence.
        start: Position of the first item in the sequence.
        end: Position after the last item.
        length: Number of tokens of the document.
    """

    sequence: int
    start: int
    end: int
    length: int


def split_sequences(sequences: Sequence[Ints], sizes: Ints, pack_length: int, overhead: int) -> list[Window]:
    """Split sequences of items into documents that fit into a row. An item is never split.

    Args:
        sequences: Items of each sequence.
        sizes: ``(N,)`` number of tokens of each item of the catalogue, including its separator.
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


def pack_windows(windows: Sequence[Window], pack_length: int, order: Hashes | None = None) -> list[list[Window]]:
    """Pack documents into rows with the best-fit heuristic: each document is added to the row with the least sufficient space.

    Args:
        windows: The documents.
        pack_length: Number of tokens of a row.
        order: ``(N,)`` numbers in whose order documents are packed. In a random order, a row has documents of different lengths, but more padding.
            Default: longest documents first, which needs the fewest rows, but puts documents of similar length into a row.

    Returns:
        The documents of each row.
    """
    rows: list[list[Window]] = []
    space: list[tuple[int, int]] = []
    keys: Sequence[Any] = [(-window.length, window.sequence, window.start) for window in windows] if order is None else order.tolist()
    for _, window in sorted(zip(keys, windows, strict=True)):
        place = bisect_left(space, (window.length, -1))
        if place == len(space):
            rows.append([])
            free, row = pack_length, len(rows) - 1
        else:
            free, row = space.pop(place)
        rows[row].append(window)
        insort(space, (free - window.length, row))
    return rows


class PackedDocuments(ABC):
    """Dataset of documents packed into rows, which are assembled when they are read.

    A subclass implements :meth:`document`, and sets ``sample_ids``.

    Args:
        windows: The documents.
        pack_length: Number of tokens of a row.
        pad_token_id: Padding token of batches.

    Attributes:
        sample_ids: ``(N,)`` int64, identifier of each row; the subclass sets it from the content of the rows.
    """

    sample_ids: Ints

    def __init__(self, windows: Sequence[Window], pack_length: int, pad_token_id: int = 0) -> None:
        self.rows = pack_windows(windows, pack_length)
        self.pad_token_id = pad_token_id

    @abstractmethod
    def document(self, window: Window) -> Sequence[int]:
        """Return the tokens of a document."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedExample:
        """Return a row; documents are numbered from 1."""
        input_ids: list[int] = []
        document_ids: list[int] = []
        for number, window in enumerate(self.rows[index], start=1):
            document = self.document(window)
            input_ids += document
            document_ids += [number] * len(document)
        return {"sample_id": int(self.sample_ids[index]), "input_ids": input_ids, "document_ids": document_ids}

    def collate(self, rows: Sequence[PackedExample]) -> PackedBatch:
        """Collate rows to a batch."""
        return collate(rows, PackedBatch, pad_token_id=self.pad_token_id)

    def row_tokens(self) -> Ints:
        """Return the number of targets of each row: all tokens except the first of each document."""
        return np.array([sum(window.length - 1 for window in row) for row in self.rows], dtype=np.int64)
