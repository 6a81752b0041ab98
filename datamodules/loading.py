"""Loader with global batches, shards for ranks, exact resumption, and rows that can change between epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from malleable.datamodules.batch import Batch
from malleable.datamodules.global_batches import GlobalBatchSampler, Shard
from malleable.datamodules.row_reader import RowReader, options_of
from malleable.datamodules.sample_ids import Ints

BatchT = TypeVar("BatchT", bound=Batch)


def sample_ids(rows: Any) -> Ints:
    """Return the ids of all rows of a dataset, ``(N,)`` int64."""
    ids: Ints | None = getattr(rows, "sample_ids", None)
    return np.array([int(rows[index]["sample_id"]) for index in range(len(rows))], dtype=np.int64) if ids is None else ids


def _order_ids(rows: Any) -> Ints | None:
    """Return the ids that the order of rows depends on; ``None`` if every row would have to be created to get them."""
    available = isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) and "sample_id" in row for row in rows)
    ids: Ints | None = sample_ids(rows) if available else getattr(rows, "sample_ids", None)
    return ids


class RowView(Dataset[Any]):
    """Subset of a dataset whose fields can be overridden, e.g. the rows of a self-play round with their negatives.

    Args:
        pool: Map-style dataset of dictionaries.
        positions: Positions in ``pool`` of the rows of the subset, in the order of the subset.
        fields: For each row of the subset, the fields to override, by name.
        collate: Function that collates rows. Default: the method ``collate`` of ``pool``, if it has one.
    """

    def __init__(
        self,
        pool: Any,
        positions: Sequence[int],
        fields: Sequence[dict[str, Any]] | None = None,
        collate: Callable[[Sequence[Any]], Batch] | None = None,
    ) -> None:
        self.pool = pool
        self.positions = list(positions)
        self.fields = fields
        self.collate: Callable[[Sequence[Any]], Batch] | None = collate or getattr(pool, "collate", None)

    @property
    def sample_ids(self) -> Ints:
        """Ids of the rows, ``(N,)``."""
        return sample_ids(self.pool)[self.positions] if len(self.positions) else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with overridden fields."""
        row = dict(self.pool[self.positions[index]])
        if self.fields is not None:
            row.update(self.fields[index])
        return row


def row_tokens(rows: Any) -> Sequence[int]:
    """Return the number of tokens of each row that contribute to the loss.

    Args:
        rows: Dataset with a method ``row_tokens``, a :class:`RowView` of such a dataset that does not override the true answers, or rows with
            ``answers`` or ``input_ids`` and ``document_ids``.

    Returns:
        The tokens of the true answer, or all tokens except the first of each document.
    """
    if isinstance(rows, RowView) and hasattr(rows.pool, "row_tokens"):
        return np.asarray(rows.pool.row_tokens())[rows.positions].tolist()  # type: ignore[no-any-return]
    if hasattr(rows, "row_tokens"):
        return rows.row_tokens()  # type: ignore[no-any-return]
    return [_row_tokens(rows[index]) for index in range(len(rows))]


def _row_tokens(row: Mapping[str, Any]) -> int:
    return len(row["answers"][0]) if "answers" in row else len(row["input_ids"]) - len(set(row["document_ids"]))


@runtime_checkable
class BatchDataset(Protocol):
    """Dataset that creates whole batches, e.g. by indexing tensors, without creating single rows."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def make_batch(self, rows: Tensor) -> Batch:
        """Return the batch of the rows at positions ``(B,)``, in their order."""


class PhasedLoader(Generic[BatchT]):
    """Loader of a map-style dataset with the same global batches on any number of devices.

    :class:`~malleable.datamodules.global_batches.GlobalBatchSampler` selects the rows, and :class:`torch.utils.data.DataLoader` reads them.
    :meth:`set_rows` exchanges the rows between epochs, e.g. for self-play rounds or mined negatives; the Trainer needs
    ``reload_dataloaders_every_n_epochs=1`` to read the new length. A run that was killed within an epoch resumes with the next batch.

    Args:
        dataset: Map-style dataset, sequence of rows, or :class:`torch.utils.data.DataLoader`. The settings of a DataLoader are the defaults of the
            other arguments; it must not have a sampler, a batch sampler, a generator or an iterable dataset. A :class:`BatchDataset` needs neither
            collation nor workers.
        batch_size: Maximum number of rows of a batch on one device; batches are smaller if ``global_batch_size`` requires it. Default: 1.
        global_batch_size: Number of rows of an optimizer step over all devices. Default: ``batch_size`` times the number of devices.
        collate_fn: Function that collates rows to a batch; a method ``collate`` of the dataset overrides it.
        shuffle: Use a new order in each epoch, which depends on ``seed``, the epoch and the ids of the rows. Default: True.
        drop_last: Omit the rows that do not fill a global batch (default). Otherwise rows are repeated with a negative ``sample_id``, so that all
            ranks have equally many batches; on one device, the last batches are shorter, with at least one row. A loss that ignores repeated rows and
            divides by ``num_step_tokens`` or ``num_step_rows`` is the mean over the distinct rows, also in an incomplete last step.
        row_tokens: Number of tokens of each row that contribute to the loss. If given, the fields ``num_step_tokens`` and ``num_step_rows`` of
            batches are set.
        seed: Seed of the order.
        num_workers: Number of worker processes. Default: 0.
        pin_memory: Return batches in pinned memory, for asynchronous copies to a GPU. Default: False.
        worker_options: Further arguments of :class:`~malleable.datamodules.row_reader.RowReader`, such as ``prefetch_factor``.

    Raises:
        ValueError: If the rows of a step cannot be distributed evenly, or if a DataLoader has unsupported settings.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | DataLoader[Any] | Sequence[Any],
        batch_size: int | None = None,
        *,
        global_batch_size: int | None = None,
        collate_fn: Callable[[Sequence[Any]], BatchT] | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        row_tokens: Sequence[int] | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        **worker_options: Any,
    ) -> None:
        given = {
            "batch_size": batch_size,
            "collate_fn": collate_fn,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
        }
        options: dict[str, Any] = {"batch_size": 1, "collate_fn": None, "shuffle": True, "drop_last": True, "num_workers": 0, "pin_memory": False}
        if isinstance(dataset, DataLoader):
            options |= options_of(dataset)
            dataset = dataset.dataset
        options |= {name: value for name, value in given.items() if value is not None} | worker_options
        self.collate_fn: Any = options.pop("collate_fn")
        if self.collate_fn is None and not isinstance(dataset, BatchDataset) and getattr(dataset, "collate", None) is None:
            raise ValueError("PhasedLoader needs a collate_fn that returns a Batch, e.g. malleable.datamodules.collate.collate")
        self.pool: Any = dataset
        self.batch_sampler = GlobalBatchSampler(
            options.pop("batch_size"), global_batch_size, shuffle=options.pop("shuffle"), drop_last=options.pop("drop_last"), seed=seed
        )
        self.pin_memory: bool = options.pop("pin_memory")
        self._worker_options = options
        self.views: dict[str, Any] = {}
        self.set_rows(dataset, row_tokens)

    def view(self, name: str) -> Any:
        """Return another dataset of training rows, e.g. ``answer`` or ``packed``; a data module sets them in the attribute ``views``.

        ``views`` maps the name of each dataset to the dataset, or to a function that creates it.

        Raises:
            KeyError: If there is no such dataset.
        """
        if name not in self.views:
            raise KeyError(
                f"the training loader has no rows {name!r}, only {sorted(self.views)}; use a data module that has them, or set the attribute `views`"
            )
        rows = self.views[name]
        return rows() if callable(rows) else rows

    def set_rows(self, rows: Dataset[Any] | Sequence[Any], row_tokens: Sequence[int] | Tensor | None = None, batch_factor: int = 1) -> None:
        """Set the rows from the next epoch on.

        Args:
            rows: Map-style dataset or sequence of rows for ``collate_fn``.
            row_tokens: Number of tokens of each row that contribute to the loss.
            batch_factor: Multiply the number of rows of a batch, and thereby of an optimizer step, by this factor; the accumulation does not change.
        """
        self.dataset: Any = rows
        self._reader = RowReader(rows, getattr(rows, "collate", None) or self.collate_fn, **self._worker_options)
        self.batch_sampler.set_rows(len(rows), _order_ids(rows), row_tokens, batch_factor)  # type: ignore[arg-type]

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Batch sampler, whose ``set_epoch`` the Trainer calls before each epoch."""
        return self.batch_sampler

    @property
    def row_tokens(self) -> Tensor | None:
        """Number of tokens of each row that contribute to the loss, ``(N,)``."""
        return self.batch_sampler.row_tokens

    @property
    def batch_size(self) -> int:
        """Number of rows of a batch on this device."""
        return self.batch_sampler.batch_size

    @property
    def max_batch_size(self) -> int:
        """Maximum number of rows of a batch on one device."""
        return self.batch_sampler.max_batch_size

    @property
    def batch_factor(self) -> int:
        """Factor by which the number of rows of a batch, and thereby of an optimizer step, is multiplied."""
        return self.batch_sampler.batch_factor

    @property
    def accumulation(self) -> int:
        """Number of accumulated batches of one rank."""
        return self.batch_sampler.accumulation

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.batch_sampler.num_steps

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all devices."""
        return self.batch_sampler.rows_per_step

    def __len__(self) -> int:
        """Return the number of batches of this rank in an epoch."""
        return len(self.batch_sampler)

    def state_dict(self) -> dict[str, int]:
        """Return the state of the batch sampler."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state of the batch sampler."""
        self.batch_sampler.load_state_dict(state)

    def __iter__(self) -> Iterator[BatchT]:
        """Yield the batches of this rank, from the restored position on.

        Raises:
            ValueError: If the restored position is within an epoch, and its batches had another layout.
        """
        shards = self.batch_sampler.shards()
        for shard, batch in zip(shards, self._read(shards), strict=True):
            self.batch_sampler.position += 1
            finished = _finish(batch, shard)
            # Pinned here instead of by the DataLoader, because the normalisers must be pinned, too: a pageable copy would synchronise.
            yield finished.pin_memory() if self.pin_memory else finished

    def stop_workers(self) -> None:
        """Stop the worker processes; they start again with the next batches."""
        self._reader.stop()

    def _read(self, shards: Sequence[Shard]) -> Iterable[BatchT]:
        if isinstance(self.dataset, BatchDataset):
            return (cast("BatchT", self.dataset.make_batch(shard.rows)) for shard in shards)
        return self._reader.read([shard.rows.tolist() for shard in shards])


def _finish(batch: BatchT, shard: Shard) -> BatchT:
    """Return the batch with negative ids of padding rows, and with the normalisers of the optimizer step."""
    changed: dict[str, Tensor] = {}
    if shard.padding:
        first = len(batch.sample_id) - shard.padding
        changed["sample_id"] = torch.cat([batch.sample_id[:first], -1 - batch.sample_id[first:]])
    for name, value in (("num_step_tokens", shard.step_tokens), ("num_step_rows", shard.step_rows)):
        if value is not None and hasattr(batch, name):
            changed[name] = torch.tensor(value)
    return batch.replace(**changed) if changed else batch
