"""A self-play round on disk: which rows, what the model answered, and the frozen reference."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.batch import Catalog, PreferenceBatch
from malleable.datamodules.collate import collate
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.table_files import read_parquet
from malleable.datamodules.loading import RowView
from malleable.datamodules.sample_ids import Ints, keyed_order


@dataclass
class RoundFile:
    """The rows of one round: state of a run, to resume from. It names items by their positions in the catalogue, and is not meant for users.

    Attributes:
        positions: Rows of the pool.
        sample_ids: Their ids.
        items: For each row the rejected items, -1 where an answer is no item.
        answers: For each row the rejected answers' tokens; empty where the model gave no answer.
        reference: For each row the reference log-probabilities of the true and the rejected answers, in nats.
    """

    positions: list[int]
    sample_ids: list[int]
    items: list[list[int]] | None = None
    answers: list[list[list[int]]] | None = None
    reference: list[list[float]] | None = None

    def table(self) -> pa.Table:
        """Return the columns known so far."""
        columns = {name: value for name, value in vars(self).items() if value is not None}
        types = {"reference": pa.list_(pa.float32())}
        return pa.table({name: pa.array(value, types.get(name)) for name, value in columns.items()})

    def digest(self) -> str:
        """Checksum of the content."""
        return hashlib.sha256(repr(self.table().to_pydict()).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the Parquet file, whole or not at all."""
        with atomic_write(path) as temporary:
            pq.write_table(self.table(), temporary)

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> RoundFile:
        """Read a round, and refuse one that is missing, unreadable or changed.

        Raises:
            MisconfigurationException: If the file is missing, cannot be read, or does not have the checksum that the checkpoint remembers.
        """
        if not path.exists():
            raise MisconfigurationException(f"the interrupted round is gone: {path} does not exist; put the file back or start a new run")
        file: RoundFile | None = None
        with suppress(ValueError, TypeError, OverflowError):  # cut off, or another table
            stored = cls(**read_parquet(path).to_pydict())
            stored.table()
            file = stored
        if file is None or (digest is not None and file.digest() != digest):
            raise MisconfigurationException(f"{path} is not the file the checkpoint was saved with; put the original back or start a new run")
        return file

    @classmethod
    def read_first(cls, paths: Sequence[Path], digest: str | None) -> RoundFile:
        """Read the first of several copies that is whole and has the checksum; the error is that of the last one."""
        for path in paths[:-1]:
            with suppress(MisconfigurationException):
                return cls.read(path, digest)
        return cls.read(paths[-1], digest)

    def without_identical(self, rows: Any) -> RoundFile:
        """Leave out rows whose rejected answer is the true one or is missing."""
        assert self.answers is not None
        assert self.items is not None
        kept = [index for index in range(len(self.positions)) if not self._identical(rows[index], index) and all(self.answers[index])]
        return RoundFile(
            [self.positions[index] for index in kept],
            [self.sample_ids[index] for index in kept],
            [self.items[index] for index in kept],
            [self.answers[index] for index in kept],
        )

    def pairs(self, pool: Any, pad_token_id: int = 0) -> RowView:
        """Return the rows with the rejected answers behind the true one, and the reference where it is known; they make a PreferenceBatch."""
        assert self.answers is not None
        assert self.items is not None
        fields = []
        for index, position in enumerate(self.positions):
            row = pool[position]
            rejected = [list(answer) or list(row["answers"][0]) for answer in self.answers[index]]
            true_item = list(row.get("item_ids", [-1]))[:1]
            fields.append({"answers": [list(row["answers"][0]), *rejected], "item_ids": [*true_item, *self.items[index]]})
            if self.reference is not None:
                fields[-1]["reference_logps"] = self.reference[index]
        return RowView(pool, self.positions, fields, partial(collate, kind=PreferenceBatch, pad_token_id=pad_token_id))

    def _identical(self, row: Any, index: int) -> bool:
        assert self.answers is not None
        true = list(row["answers"][0])
        return any(list(answer) == true for answer in self.answers[index])

    def figures(self, rows: Any, catalog: Catalog | None) -> dict[str, float]:
        """What the round's answers look like.

        Returns:
            ``frac_identical`` (rejected equals true), ``frac_invalid`` (no item of the catalogue), ``distinct_negs`` (share of distinct answers),
            ``top_neg_share`` (of the ten most frequent), ``mean_pop_neg`` (mean training interactions of the rejected items).
        """
        assert self.answers is not None
        assert self.items is not None
        answers = [tuple(answer) for row in self.answers for answer in row]
        items = [item for row in self.items for item in row]
        identical = sum(self._identical(rows[index], index) for index in range(len(self.positions)))
        top = sum(count for _, count in Counter(answers).most_common(10))
        figures = {
            "frac_identical": identical / len(self.positions),
            "frac_invalid": sum(item < 0 for item in items) / len(items),
            "distinct_negs": len(set(answers)) / len(answers),
            "top_neg_share": top / len(answers),
        }
        if catalog is not None and catalog.popularity:
            known = [catalog.popularity[item] for item in items if item >= 0]
            figures["mean_pop_neg"] = sum(known) / max(1, len(known))
        return figures


def answer_statistics(items: Sequence[int], popularity: Sequence[int] = ()) -> dict[str, float]:
    """Describe how concentrated answers are.

    Args:
        items: The answers; negative values are no item and are left out.
        popularity: Training interactions of each item of the catalogue; empty if unknown.

    Returns:
        ``distinct`` (number of different items), ``top_3_share`` (share of the three most frequent items) and, where the popularity is known,
        ``mean_popularity`` (mean number of training interactions).
    """
    known = [item for item in items if item >= 0]
    counts = Counter(known)
    figures = {"distinct": float(len(counts)), "top_3_share": sum(count for _, count in counts.most_common(3)) / max(1, len(known))}
    if popularity:
        figures["mean_popularity"] = sum(popularity[item] for item in known) / max(1, len(known))
    return figures


def draw_positions(ids: Ints, count: int | None, number: int, seed: int) -> list[int]:
    """Draw the rows of a round without replacement across rounds, until the pool cannot fill another.

    Rounds are consecutive pieces of an order of the pool, then of the next order. An order depends on the seed and the ids of the rows alone.

    Args:
        ids: ``(N,)`` ids of the pool's rows.
        count: Rows of a round; ``None`` takes all.
        number: The round, from 1; 0 for a draw of its own.
        seed: Seed of the orders.

    Raises:
        ValueError: If a round is empty, or larger than the pool.
    """
    if count is None:
        return list(range(len(ids)))
    if count < 1:
        raise ValueError(f"a round needs at least 1 row, got {count}; null takes all")
    if count > len(ids):
        raise ValueError(f"a round needs {count} rows but there are {len(ids)} training rows; lower rows_per_round")
    shuffle, piece = divmod(max(0, number - 1), len(ids) // count)
    positions: list[int] = keyed_order(ids, seed, 2 * shuffle + (number == 0))[piece * count : (piece + 1) * count].tolist()
    return positions
