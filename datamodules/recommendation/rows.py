"""Rows of a prompt and its answers, which are assembled from memory-mapped histories and tokenised titles when they are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from malleable.datamodules.batch import AnswerBatch, Example, PreferenceBatch
from malleable.datamodules.collate import collate
from malleable.datamodules.negative_samplers import BoundSampler, RowItems
from malleable.datamodules.recommendation.prompt import PromptPieces
from malleable.datamodules.recommendation.splits import Ints, RowIndex

log = logging.getLogger(__name__)


class RaggedColumn(Sequence[Ints]):
    """Lists of integers in an Arrow column, which are read without a copy."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.column)

    def __getitem__(self, index: int) -> Ints:  # type: ignore[override]
        """Return one list."""
        items: Ints = self.column[index].values.to_numpy()
        return items


class SelectedColumn(Sequence[Any]):
    """Lists of the values at given positions of a column.

    Args:
        values: ``(E,)``.
        positions: Positions of the values of each list.
    """

    def __init__(self, values: NDArray[Any], positions: Sequence[Ints]) -> None:
        self.values = values
        self.positions = positions

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.positions)

    def __getitem__(self, index: int) -> NDArray[Any]:  # type: ignore[override]
        """Return one list."""
        values: NDArray[Any] = self.values[self.positions[index]]
        return values


@dataclass
class RowTable:
    """Table of N rows. The prompt of a row contains the items ``start:end`` of a history; the true answer is ``target``.

    Attributes:
        sample_id: ``(N,)`` stable ids.
        sequence: ``(N,)`` index of the history in the ``sequences`` that the table was built from.
        start: ``(N,)`` position of the first item in the prompt.
        end: ``(N,)`` position after the last item in the prompt.
        target: ``(N,)`` true next item; -1 if there is none.
        candidates: Items to choose from, for each row; ``None`` for the whole catalogue.
    """

    sample_id: Ints
    sequence: Ints
    start: Ints
    end: Ints
    target: Ints
    candidates: Sequence[Ints] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sample_id)


@dataclass(frozen=True)
class Lengths:
    """Maximum numbers of items before the target.

    Attributes:
        sequence: Maximum number that sequence models and counting baselines read.
        metric: Maximum number that metrics count as the user's history.
    """

    sequence: int
    metric: int


@dataclass(frozen=True)
class PromptWindow:
    """Limits of the part of a history that a prompt contains.

    Attributes:
        history_length: Maximum number of items in a prompt.
        pieces: Tokenised template and catalogue; ``None`` if prompts have no text.
        max_prompt_length: Maximum number of tokens of a prompt; ``None``: no limit.
    """

    history_length: int
    pieces: PromptPieces | None = None
    max_prompt_length: int | None = None

    def make_rows(self, split: str, sequences: Sequence[Ints], index: RowIndex, sample_id: Ints | None = None) -> RowTable:
        """Return the rows of a split, with the items that fit into each prompt.

        Args:
            split: Name of the split, for messages.
            sequences: Items of each history, oldest first.
            index: The rows; a row whose ``end`` is the length of its sequence has no target.
            sample_id: ``(N,)`` ids of the rows; default: their numbers.

        Raises:
            ValueError: If not a single item fits into a prompt.
        """
        flat = np.concatenate([*sequences, np.zeros(1, dtype=np.int64)])
        bases = np.cumsum([0, *(len(items) for items in sequences)])
        base, stop = bases[index.sequence], bases[index.sequence] + index.end
        target = np.where(stop < bases[index.sequence + 1], flat[stop], -1)
        start = np.maximum(base, stop - self.history_length)
        if self.pieces is not None and self.max_prompt_length is not None:
            start = self._shorten(split, self.pieces, self.max_prompt_length, flat, start, stop, index.candidates)
        return RowTable(np.arange(len(stop)) if sample_id is None else sample_id, index.sequence, start - base, index.end, target, index.candidates)

    @staticmethod
    def _shorten(split: str, pieces: PromptPieces, limit: int, flat: Ints, start: Ints, stop: Ints, candidates: Sequence[Ints] | None) -> Ints:
        """Return later starts, so that the tokens of each prompt fit into the limit; prefix, suffix and candidates are never shortened.

        Args:
            split: Name of the split, for messages.
            pieces: Tokenised template and catalogue.
            limit: Maximum number of tokens of a prompt.
            flat: Items of all sequences, concatenated.
            start: ``(N,)`` position in ``flat`` of the first item of each prompt.
            stop: ``(N,)`` position in ``flat`` after the last item of each prompt.
            candidates: Candidates of each row, or ``None``.
        """
        space = np.full(len(stop), limit - len(pieces.prefix) - len(pieces.suffix) + len(pieces.separator))
        if candidates is not None and pieces.candidates_prefix is not None:
            sizes = np.array([len(ids) for ids in pieces.candidates])
            space -= len(pieces.candidates_prefix) + np.array([sizes[items].sum() for items in candidates], dtype=np.int64)
        # total[i] is the number of tokens of the items before position i. The items from position i to `stop` need total[stop] - total[i] tokens.
        sizes = np.array([len(ids) + len(pieces.separator) for ids in pieces.items])
        total = np.concatenate([[0], np.cumsum(sizes[flat])])
        first = np.searchsorted(total, total[stop] - space)
        if (empty := first >= stop).any():
            needed = limit + int((total[stop] - total[stop - 1] - space)[empty].max())
            raise ValueError(
                f"max_prompt_length {limit} is too small for a single item in {int(empty.sum())} {split} prompts; increase it to at least {needed}"
            )
        if shortened := int((first > start).sum()):
            log.warning("%d of %d %s prompts exceed max_prompt_length %d: their oldest items are omitted", shortened, len(stop), split, limit)
        later: Ints = np.maximum(start, first)
        return later


class AnswerRows:
    """Dataset of rows with a prompt and its answers, the true answer first.

    Args:
        table: The rows.
        sequences: Items of each history, oldest first.
        pieces: Tokenised template and catalogue; ``None``: prompts and answers have no tokens, only items.
        lengths: Maximum numbers of items that sequence models read and that metrics count. Default: only the items in the prompt.
        hide_seen: Do not recommend the items before the target again.
        hidden: For each row of ``table``, items that are not recommended, in addition to those of ``hide_seen``.
        negatives: Sampler of rejected answers, which are added after the true one.
        select: Positions in ``table`` of the rows to use; default: all.
        pad_token_id: Padding token of batches.
    """

    def __init__(
        self,
        table: RowTable,
        sequences: Sequence[Ints],
        pieces: PromptPieces | None,
        *,
        lengths: Lengths | None = None,
        hide_seen: bool = True,
        hidden: Sequence[Ints] | None = None,
        negatives: BoundSampler | None = None,
        select: Ints | None = None,
        pad_token_id: int = 0,
    ) -> None:
        self.table = table
        self.sequences = sequences
        self.pieces = pieces
        self.lengths = lengths
        self.hide_seen = hide_seen
        self.hidden = hidden
        self.negatives = negatives
        self.select = np.arange(len(table)) if select is None else select
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.select)

    def __getitem__(self, index: int) -> Example:
        """Return a row."""
        table, row = self.table, self.select[index]
        start, end = table.start[row], table.end[row]
        before = self.sequences[int(table.sequence[row])][:end].tolist()
        shown = before[start:]
        sample_id = int(table.sample_id[row])
        candidates = table.candidates[int(row)].tolist() if table.candidates is not None else []
        target = int(table.target[row])
        answers = [target, *self._rejected(sample_id, [*before, target], candidates)] if target >= 0 else [-1]
        example: Example = {
            "sample_id": sample_id,
            "prompt": self.pieces.prompt(shown, candidates) if self.pieces is not None else (),
            "answers": [self.pieces.answers[item] if self.pieces is not None and item >= 0 else () for item in answers],
            "item_ids": answers,
            "history": shown if self.lengths is None else before[-self.lengths.sequence :],
            "earlier": before,
            "seen": before if self.hide_seen else (),
        }
        if self.lengths is not None and self.lengths.metric != self.lengths.sequence:
            example["metric_history"] = before[-self.lengths.metric :]
        if self.hidden is not None:
            example["seen"] = [*example["seen"], *self.hidden[row].tolist()]
        if candidates:
            example["candidates"] = candidates
        return example

    @property
    def sample_ids(self) -> Ints:
        """The ids of the rows, ``(N,)``."""
        return self.table.sample_id[self.select]

    def collate(self, rows: Sequence[Example]) -> AnswerBatch:
        """Collate rows to a :class:`PreferenceBatch` if there is a sampler of negatives, otherwise to an :class:`AnswerBatch`."""
        return collate(rows, AnswerBatch if self.negatives is None else PreferenceBatch, pad_token_id=self.pad_token_id)

    def row_tokens(self) -> Ints:
        """Return the number of tokens of each row's true answer."""
        if self.pieces is None:
            return np.zeros(len(self), dtype=np.int64)
        lengths = np.array([len(answer) for answer in self.pieces.answers])
        return lengths[self.table.target[self.select]]

    def _rejected(self, sample_id: int, exclude: list[int], candidates: list[int]) -> list[int]:
        return [] if self.negatives is None else self.negatives(RowItems(sample_id, set(exclude), candidates))
