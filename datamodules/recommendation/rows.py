"""Rows assembled at access from memory-mapped histories and tokenised titles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from malleable.datamodules.batch import AnswerBatch, Example, PreferenceBatch
from malleable.datamodules.collate import collate
from malleable.datamodules.negatives import BoundSampler, RowItems
from malleable.datamodules.recommendation.prompt import PromptPieces
from malleable.datamodules.recommendation.splits import Ints, RowIndex

log = logging.getLogger(__name__)


class Ragged(Sequence[Ints]):
    """Integer lists of an Arrow column, each a view without a copy."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.column)

    def __getitem__(self, index: int) -> Ints:  # type: ignore[override]
        """Return one list."""
        items: Ints = self.column[index].values.to_numpy()
        return items


@dataclass
class RowTable:
    """Where each row lies: it shows ``items[start:end]`` of its sequence and asks for ``target``.

    Attributes:
        sample_id: ``(N,)`` stable ids.
        sequence: ``(N,)``.
        start: ``(N,)``.
        end: ``(N,)``.
        target: ``(N,)`` true next item; -1 where there is none.
        candidates: Items to choose from of each row, or ``None``.
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
    """How many items before the target are used, at most.

    Attributes:
        sequence: By models of item sequences and counting baselines.
        metric: By metrics that compare recommendations with the history.
    """

    sequence: int
    metric: int


@dataclass(frozen=True)
class Reach:
    """How far back prompts reach.

    Attributes:
        history_length: Items a prompt shows, at most.
        pieces: The tokenised template and catalogue, or ``None``.
        max_prompt_length: Tokens of a prompt, at most, or ``None``.
    """

    history_length: int
    pieces: PromptPieces | None = None
    max_prompt_length: int | None = None

    def place(self, name: str, sequences: Sequence[Ints], index: RowIndex, sample_id: Ints | None = None) -> RowTable:
        """Place the rows of a split.

        Args:
            name: The split, for messages.
            sequences: Items of each history, oldest first.
            index: The rows; where ``end`` is the length of the sequence, there is no target.
            sample_id: ``(N,)`` ids of the rows; default: their numbers.

        Raises:
            ValueError: If a prompt has no room for a single item.
        """
        flat = np.concatenate([*sequences, np.zeros(1, dtype=np.int64)])
        bases = np.cumsum([0, *(len(items) for items in sequences)])
        base, stop = bases[index.sequence], bases[index.sequence] + index.end
        target = np.where(stop < bases[index.sequence + 1], flat[stop], -1)
        start = np.maximum(base, stop - self.history_length)
        if self.pieces is not None and self.max_prompt_length is not None:
            start = self._shorten(name, self.pieces, self.max_prompt_length, flat, start, stop, index.candidates)
        return RowTable(np.arange(len(stop)) if sample_id is None else sample_id, index.sequence, start - base, index.end, target, index.candidates)

    @staticmethod
    def _shorten(name: str, pieces: PromptPieces, limit: int, flat: Ints, start: Ints, stop: Ints, candidates: Sequence[Ints] | None) -> Ints:
        """Leave out the oldest items until a prompt fits; prefix, suffix and candidates always stay."""
        room = np.full(len(stop), limit - len(pieces.prefix) - len(pieces.suffix) + len(pieces.separator))
        if candidates is not None and pieces.candidates_prefix is not None:
            sizes = np.array([len(ids) for ids in pieces.candidates])
            room -= len(pieces.candidates_prefix) + np.array([sizes[items].sum() for items in candidates], dtype=np.int64)
        # total[i]: tokens of all items before the i-th; the first that still fits lies at most `room` before the end.
        sizes = np.array([len(ids) + len(pieces.separator) for ids in pieces.items])
        total = np.concatenate([[0], np.cumsum(sizes[flat])])
        fitting = np.searchsorted(total, total[stop] - room)
        if (lost := fitting >= stop).any():
            needed = limit + int((total[stop] - total[stop - 1] - room)[lost].max())
            raise ValueError(f"max_prompt_length {limit} leaves {int(lost.sum())} {name} prompts without any item; raise it to at least {needed}")
        if shortened := int((fitting > start).sum()):
            log.warning("%d of %d %s prompts exceed max_prompt_length %d: their oldest items are left out", shortened, len(stop), name, limit)
        shown: Ints = np.maximum(start, fitting)
        return shown


class AnswerRows:
    """One prompt and its answers a row, the true one first.

    Args:
        table: Where the rows lie.
        sequences: Items of each history, oldest first.
        pieces: The tokenised template and catalogue; ``None`` gives rows of items alone, with empty prompts and answers.
        lengths: Items that sequence models read and that metrics count; default: those that the prompt shows.
        hide_seen: List the items before the target as seen, not to be recommended again.
        hidden: Further items that are not recommended, by row of ``table``.
        negatives: Chooses rejected answers to add to the true one.
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
        """Make a :class:`PreferenceBatch` where rows have negatives, else an :class:`AnswerBatch`."""
        return collate(rows, AnswerBatch if self.negatives is None else PreferenceBatch, pad_token_id=self.pad_token_id)

    def row_tokens(self) -> Ints:
        """Return the length of each row's true answer."""
        if self.pieces is None:
            return np.zeros(len(self), dtype=np.int64)
        lengths = np.array([len(answer) for answer in self.pieces.answers])
        return lengths[self.table.target[self.select]]

    def _rejected(self, sample_id: int, exclude: list[int], candidates: list[int]) -> list[int]:
        # An answer stands among the candidates that the prompt offers.
        return [] if self.negatives is None else self.negatives(RowItems(sample_id, set(exclude), candidates))
