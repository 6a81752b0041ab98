"""The training loader: global batches, shards by rank, exact resumption, and rows that may change between epochs."""

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
    """Return the ids that the order of rows depends on; ``None`` where they are not at hand without making every row."""
    at_hand = isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) and "sample_id" in row for row in rows)
    ids: Ints | None = sample_ids(rows) if at_hand else getattr(rows, "sample_ids", None)
    return ids


class RowView(Dataset[Any]):
    """Chosen rows of a dataset, with fields put over them: a round's sample with its negatives, pairs with their reference.

    Args:
        pool: Map-style dataset of dictionaries.
        positions: Rows to show, in this order.
        fields: For each shown row, the fields to set.
        collate: Makes a batch of these rows, where it is another kind than that of the dataset.
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
        """The ids of the shown rows, ``(N,)``."""
        return sample_ids(self.pool)[self.positions] if len(self.positions) else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with its fields."""
        row = dict(self.pool[self.positions[index]])
        if self.fields is not None:
            row.update(self.fields[index])
        return row


@runtime_checkable
class MakesBatches(Protocol):
    """A dataset that makes a batch of chosen rows at once, e.g. by indexing tensors: no row of its own is ever made."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def make_batch(self, rows: Tensor) -> Batch:
        """Make the batch of the rows ``(B,)``, in their order."""


class PhasedLoader(Generic[BatchT]):
    """Batches of a map-style dataset, the same global batches on any number of devices.

    A :class:`~malleable.datamodules.global_batches.GlobalBatchSampler` chooses the rows, a :class:`torch.utils.data.DataLoader` reads them.
    :meth:`set_rows` exchanges the rows between epochs (self-play rounds, mined negatives); with ``reload_dataloaders_every_n_epochs=1`` the Trainer
    then sees the new length. The state in a checkpoint makes a run that was killed within an epoch go on with the very next batch.

    Args:
        dataset: Rows with a length. A :class:`torch.utils.data.DataLoader` is taken apart: its batch size, shuffling, last batch, collation, pinning
            and workers are the defaults of the other arguments; a sampler, batch sampler, generator or iterable dataset is refused. Of a
            dataset that :class:`MakesBatches`, whole batches are asked for; it needs neither collation nor workers.
        batch_size: Rows of one forward pass on one device, at most: more devices than ``global_batch_size`` needs pass fewer each; default: 1.
        global_batch_size: Rows of one optimizer step over all devices; default: ``batch_size`` times the number of devices.
        collate_fn: Makes a batch of rows; a dataset with a method ``collate`` says itself which batch its rows make.
        shuffle: Draw a new order each epoch, from ``seed``, the epoch's number and the ids of the rows; default: True.
        drop_last: Leave out the rows that do not fill a global batch (default); otherwise repeat rows, marked by a negative ``sample_id``, so that
            all ranks make equally many batches (on one device the last ones are short, of one row at least). A loss that leaves out
            the marked rows and divides by ``num_step_tokens`` or ``num_step_rows`` is then the mean over a short last step, too.
        row_tokens: Number of loss-bearing tokens of each row; given, every batch carries ``num_step_tokens`` and ``num_step_rows``, if it
            has such fields.
        seed: Seed of the order.
        num_workers: Worker processes; default: 0.
        pin_memory: Hand out batches in pinned memory, which copies to a GPU do not wait for; default: False.
        worker_options: More arguments of :class:`~malleable.datamodules.row_reader.RowReader`, such as ``prefetch_factor``.

    Raises:
        ValueError: If the rows of a step cannot be distributed evenly, or a DataLoader has what cannot be kept.
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
        if self.collate_fn is None and not isinstance(dataset, MakesBatches) and getattr(dataset, "collate", None) is None:
            raise ValueError("PhasedLoader needs a collate_fn that makes a Batch, e.g. malleable.datamodules.batch.collate")
        self.pool: Any = dataset
        self.batch_sampler = GlobalBatchSampler(
            options.pop("batch_size"), global_batch_size, shuffle=options.pop("shuffle"), drop_last=options.pop("drop_last"), seed=seed
        )
        self.pin_memory: bool = options.pop("pin_memory")
        self._worker_options = options
        self.views: dict[str, Any] = {}
        self.set_rows(dataset, row_tokens)

    def view(self, name: str) -> Any:
        """Return another view of the same data, which a data module put into ``views``: rows, or a callable that makes them.

        Raises:
            KeyError: If there is no such view.
        """
        if name not in self.views:
            raise KeyError(f"the training loader has no view {name!r}, only {sorted(self.views)}; use a data module that offers it, or set `views`")
        rows = self.views[name]
        return rows() if callable(rows) else rows

    def set_rows(self, rows: Dataset[Any] | Sequence[Any], row_tokens: Sequence[int] | Tensor | None = None, batch_factor: int = 1) -> None:
        """Set the rows from the next epoch on.

        Args:
            rows: Map-style dataset or sequence of what ``collate_fn`` takes.
            row_tokens: Loss-bearing tokens of each row.
            batch_factor: How many times the rows of a pass and of an optimizer step; the accumulation stays the same.
        """
        self.dataset: Any = rows
        self._reader = RowReader(rows, getattr(rows, "collate", None) or self.collate_fn, **self._worker_options)
        self.batch_sampler.set_rows(len(rows), _order_ids(rows), row_tokens, batch_factor)  # type: ignore[arg-type]

    @property
    def sampler(self) -> GlobalBatchSampler:
        """The batch sampler: the Trainer calls its ``set_epoch`` before each epoch."""
        return self.batch_sampler

    @property
    def row_tokens(self) -> Tensor | None:
        """Loss-bearing tokens of each row, ``(N,)``."""
        return self.batch_sampler.row_tokens

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass on this device."""
        return self.batch_sampler.batch_size

    @property
    def max_batch_size(self) -> int:
        """Rows of one forward pass on one device, at most."""
        return self.batch_sampler.max_batch_size

    @property
    def batch_factor(self) -> int:
        """How many times the rows of a pass and of an optimizer step are those of the settings."""
        return self.batch_sampler.batch_factor

    @property
    def accumulation(self) -> int:
        """Batches of one rank that make an optimizer step."""
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
        """Yield this rank's batches, from where a restored state left off.

        Raises:
            ValueError: If the restored state lies within an epoch whose batches had another layout.
        """
        shards = self.batch_sampler.shards()
        for shard, batch in zip(shards, self._read(shards), strict=True):
            self.batch_sampler.position += 1
            finished = _finish(batch, shard)
            # Here and not by the DataLoader, so that the normalisers are pinned too: one pageable copy would wait for the device.
            yield finished.pin_memory() if self.pin_memory else finished

    def stop_workers(self) -> None:
        """End the worker processes; they start again with the next batches."""
        self._reader.stop()

    def _read(self, shards: Sequence[Shard]) -> Iterable[BatchT]:
        if isinstance(self.dataset, MakesBatches):
            return (cast("BatchT", self.dataset.make_batch(shard.rows)) for shard in shards)
        return self._reader.read([shard.rows.tolist() for shard in shards])


def _finish(batch: BatchT, shard: Shard) -> BatchT:
    """Mark the repeated rows and give the normalisers of the step."""
    changed: dict[str, Tensor] = {}
    if shard.padding:
        first = len(batch.sample_id) - shard.padding
        changed["sample_id"] = torch.cat([batch.sample_id[:first], -1 - batch.sample_id[first:]])
    for name, value in (("num_step_tokens", shard.step_tokens), ("num_step_rows", shard.step_rows)):
        if value is not None and hasattr(batch, name):
            changed[name] = torch.tensor(value)
    return batch.replace(**changed) if changed else batch
