"""Dataset of documents packed into rows of fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from malleable.datamodules.language.packing import PackedDocuments, Window
from malleable.datamodules.sample_ids import array_hash, content_ids


class TextRows(PackedDocuments):
    """Documents packed into rows; documents longer than a row are split.

    Args:
        documents: Tokens of each document.
        pack_length: Number of tokens of a row.
        pad_token_id: Padding token of batches.

    Raises:
        ValueError: If no document has at least two tokens, so that no token could be predicted.
    """

    def __init__(self, documents: Sequence[Sequence[int]], pack_length: int, pad_token_id: int = 0) -> None:
        parts = [document[start : start + pack_length] for document in documents for start in range(0, len(document), pack_length)]
        self.documents = [part for part in parts if len(part) > 1]
        if not self.documents:
            raise ValueError("no text has at least two tokens, which training needs; give longer texts")
        super().__init__([Window(number, 0, 1, len(document)) for number, document in enumerate(self.documents)], pack_length, pad_token_id)
        contents = [np.concatenate([self.documents[window.sequence] for window in row]).astype(np.int64) for row in self.rows]
        self.sample_ids = content_ids(np.array([array_hash(content) for content in contents], dtype=np.uint64))

    def document(self, window: Window) -> Sequence[int]:
        """Return the tokens of a document."""
        return self.documents[window.sequence]
