"""Dataset of whole histories, packed into rows of fixed length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from malleable.datamodules.language.packing import PackedDocuments, Window, split_sequences
from malleable.datamodules.recommendation.prompt import PromptPieces
from malleable.datamodules.recommendation.splits import Ints
from malleable.datamodules.sample_ids import array_hash, content_ids


class PackedRows(PackedDocuments):
    """Histories packed into rows, which are assembled when they are read. Histories longer than a row are split between items.

    Documents with a single item are omitted, because nothing precedes the item.

    Args:
        sequences: Items of each history, oldest first.
        pieces: Tokenised template and catalogue.
        pack_length: Number of tokens of a row.
        pad_token_id: Padding token of batches.
    """

    def __init__(self, sequences: Sequence[Ints], pieces: PromptPieces, pack_length: int = 512, pad_token_id: int = 0) -> None:
        self.sequences = sequences
        self.pieces = pieces
        sizes = np.array([len(tokens) + len(pieces.separator) for tokens in pieces.items])
        # The first item has no separator, and the document ends with the end-of-sequence token.
        overhead = len(pieces.prefix) - len(pieces.separator) + 1
        windows = split_sequences(sequences, sizes, pack_length, overhead)
        super().__init__([window for window in windows if window.end - window.start > 1], pack_length, pad_token_id)
        items = np.array([array_hash(np.array(tokens)) for tokens in pieces.items], dtype=np.uint64)
        contents = [np.concatenate([sequences[window.sequence][window.start : window.end] for window in row]) for row in self.rows]
        self.sample_ids = content_ids(np.array([array_hash(items[content]) for content in contents], dtype=np.uint64))

    def document(self, window: Window) -> list[int]:
        """Return the tokens of a document."""
        return self.pieces.document(self.sequences[window.sequence][window.start : window.end].tolist())
