"""Dataset of documents packed into rows of fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from malleable.datamodules.batch import PackedBatch, PackedExample
from malleable.datamodules.collate import collate
from malleable.datamodules.language.packing import Window, pack_windows
from malleable.datamodules.sample_ids import Ints, array_hash, content_ids


class TextRows:
    """Documents packed into rows; documents longer than a row are split.

    Args:
        documents: Tokens of each document.
        pack_length: Number of tokens of a row.
        pad_token_id: Padding token of batches.

    Raises:
        ValueError: If no document has at least two tokens, so that no token could be predicted.
    """

    def __init__(self, documents: Sequence[Sequence[int]], pack_length: int, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id
        parts = [document[start : start + pack_length] for document in documents for start in range(0, len(document), pack_length)]
        self.documents = [part for part in parts if len(part) > 1]
        if not self.documents:
            raise ValueError("no text has at least two tokens, which training needs; give longer texts")
        self.rows = pack_windows([Window(number, 0, 1, len(document)) for number, document in enumerate(self.documents)], pack_length)
        contents = [np.concatenate([self.documents[window.sequence] for window in row]).astype(np.int64) for row in self.rows]
        self.sample_ids = content_ids(np.array([array_hash(content) for content in contents], dtype=np.uint64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedExample:
        """Return a row; documents are numbered from 1."""
        input_ids: list[int] = []
        document_ids: list[int] = []
        for number, window in enumerate(self.rows[index], start=1):
            document = self.documents[window.sequence]
            input_ids += document
            document_ids += [number] * len(document)
        return {"sample_id": int(self.sample_ids[index]), "input_ids": input_ids, "document_ids": document_ids}

    def collate(self, rows: Sequence[PackedExample]) -> PackedBatch:
        """Collate rows to a batch."""
        return collate(rows, PackedBatch, pad_token_id=self.pad_token_id)

    def row_tokens(self) -> Ints:
        """Return the number of targets of each row: all tokens except the first of each document."""
        return np.array([sum(window.length - 1 for window in row) for row in self.rows], dtype=np.int64)
