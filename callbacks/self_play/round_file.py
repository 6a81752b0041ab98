"""File of a self-play round: rows, rejected answers and reference log-probabilities."""

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
    """Rows of a round, from which a run is resumed. This is an internal file: items are indices into the catalogue of the run.

    Attributes:
        positions: Index of each row in the pool.
        sample_ids: Id of each row.
        items: Rejected items of each row; -1 if an answer is not an item.
        answers: Tokens of the rejected answers of each row; empty if the model gave no answer.
        reference: Reference log-probabilities of the true and the rejected answers of each row, in nats.
    """

    positions: list[int]
    sample_ids: list[int]
    items: list[list[int]] | None = None
    answers: list[list[list[int]]] | None = None
    reference: list[list[float]] | None = None

    def table(self) -> pa.Table:
        """Return the columns that are set, as a table."""
        columns = {name: value for name, value in vars(self).items() if value is not None}
        types = {"reference": pa.list_(pa.float32())}
        return pa.table({name: pa.array(value, types.get(name)) for name, value in columns.items()})

    def digest(self) -> str:
        """Return a checksum of the content."""
        return hashlib.sha256(repr(self.table().to_pydict()).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the Parquet file atomically."""
        with atomic_write(path) as temporary:
            pq.write_table(self.table(), temporary)

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> RoundFile:
        """Read the file of a round.

        Args:
            path: The file.
            digest: Expected checksum; ``None`` omits the check.

        Raises:
            MisconfigurationException: If the file does not exist, cannot be read, or has another checksum.
        """
        if not path.exists():
            raise MisconfigurationException(
                f"the file of the interrupted round is missing: {path} does not exist; restore this file, or start a new run"
            )
        file: RoundFile | None = None
        with suppress(ValueError, TypeError, OverflowError):  # a truncated file, or another table
            stored = cls(**read_parquet(path).to_pydict())
            stored.table()
            file = stored
        if file is None or (digest is not None and file.digest() != digest):
            raise MisconfigurationException(
                f"{path} is damaged, or is not the round file that belongs to the checkpoint; restore that file, or start a new run"
            )
        return file

    @classmethod
    def read_first(cls, paths: Sequence[Path], digest: str | None) -> RoundFile:
        """Read the first of several copies that is complete and has the checksum. If there is none, the error is that of the last copy."""
        for path in paths[:-1]:
            with suppress(MisconfigurationException):
                return cls.read(path, digest)
        return cls.read(paths[-1], digest)

    def without_identical(self, rows: Any) -> RoundFile:
        """Return the rows whose rejected answers exist and differ from the true answer."""
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
        """Return rows with true answer, rejected answers and, if computed, reference log-probabilities. They collate to a ``PreferenceBatch``."""
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
        """Compute statistics of the rejected answers.

        Returns:
            ``frac_identical`` (share of rows whose rejected answer is the true one), ``frac_invalid`` (share of answers that are not items),
            ``distinct_negs`` (number of distinct answers divided by the number of answers), ``top_neg_share`` (share of the ten most frequent
            answers) and, if the popularity is known, ``mean_pop_neg`` (mean number of training interactions of the rejected items).
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
    """Compute statistics of the concentration of answers.

    Args:
        items: Items of the answers. Negative values are not items and are omitted.
        popularity: Number of training interactions of each item of the catalogue; empty if unknown.

    Returns:
        ``distinct`` (number of distinct items), ``top_3_share`` (share of the three most frequent items) and, if the popularity is known,
        ``mean_popularity`` (mean number of training interactions).
    """
    known = [item for item in items if item >= 0]
    counts = Counter(known)
    figures = {"distinct": float(len(counts)), "top_3_share": sum(count for _, count in counts.most_common(3)) / max(1, len(known))}
    if popularity:
        figures["mean_popularity"] = sum(popularity[item] for item in known) / max(1, len(known))
    return figures


def draw_positions(ids: Ints, count: int | None, number: int, seed: int) -> list[int]:
    """Draw the rows of a round without replacement across rounds.

    The pool is shuffled, and rounds are consecutive parts of it. If the remaining rows are too few for a round, the pool is shuffled again. The order
    depends only on the seed and the ids of the rows.

    Args:
        ids: Ids of the rows of the pool, ``(N,)``.
        count: Number of rows of a round; ``None`` for all rows.
        number: Number of the round, from 1; 0 for an independent draw.
        seed: Random seed.

    Returns:
        Indices of the rows in ``ids``.

    Raises:
        ValueError: If ``count`` is less than 1, or larger than the pool.
    """
    if count is None:
        return list(range(len(ids)))
    if count < 1:
        raise ValueError(f"a round must have at least 1 row, got {count}; null uses all rows")
    if count > len(ids):
        raise ValueError(f"a round needs {count} rows, but there are {len(ids)} training rows; lower rows_per_round")
    shuffle, part = divmod(max(0, number - 1), len(ids) // count)
    positions: list[int] = keyed_order(ids, seed, 2 * shuffle + (number == 0))[part * count : (part + 1) * count].tolist()
    return positions
