"""The training loader: global batches, shards by rank, exact resumption, and rows that may change between epochs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from malleable.datamodules.batch import Batch

log = logging.getLogger(__name__)

BatchT = TypeVar("BatchT", bound=Batch)


def world() -> tuple[int, int]:
    """Return ``(rank, world size)`` of this process, ``(0, 1)`` without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class RowView(Dataset[Any]):
    """Chosen rows of a dataset, with fields put over them: a round's sample with its negatives, pairs with their reference.

    Args:
        pool: Map-style dataset of dictionaries.
        positions: Rows to show, in this order.
        fields: For each shown row, the fields to set.
    """

    def __init__(self, pool: Any, positions: Sequence[int], fields: Sequence[dict[str, Any]] | None = None) -> None:
        self.pool = pool
        self.positions = list(positions)
        self.fields = fields

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with its fields."""
        row = dict(self.pool[self.positions[index]])
        if self.fields is not None:
            row.update(self.fields[index])
        return row


class Deal(NamedTuple):
    """How the rows of an optimizer step are dealt.

    Attributes:
        rows: Rows of one forward pass on one device.
        batches: Passes of one device that make an optimizer step.
    """

    rows: int
    batches: int


def deal(batch_size: int, global_batch_size: int | None) -> Deal:
    """Deal the rows of an optimizer step to the devices at hand.

    Args:
        batch_size: Rows that one device can pass at once.
        global_batch_size: Rows of one optimizer step over all devices; default: one full batch of each.

    Raises:
        ValueError: If the rows of a step cannot be dealt evenly.
    """
    _, size = world()
    total = global_batch_size or batch_size * size
    share = total // size
    rows = min(batch_size, share)
    if total % size or share % rows:
        raise ValueError(
            f"global_batch_size {total} must be a multiple of batch_size x devices = {batch_size} x {size}, or less than that and a multiple of "
            f"the devices; choose another batch_size or number of devices"
        )
    return Deal(rows, share // rows)


class PhasedLoader(Generic[BatchT]):
    """Batches of a map-style dataset, the same global batches on any number of devices.

    Step ``s`` of epoch ``e`` always holds the same ``global_batch_size`` rows; they are dealt to the ranks and, on each
    rank, cut into batches of ``batch_size``. :meth:`show` exchanges the rows between epochs (self-play rounds, mined
    negatives); with ``reload_dataloaders_every_n_epochs=1`` the Trainer then sees the new length. The state in a
    checkpoint makes a run that was killed within an epoch go on with the very next batch.

    Args:
        dataset: Rows with a length; a :class:`torch.utils.data.DataLoader` is taken apart (dataset, batch size, collation, workers).
        batch_size: Rows of one forward pass on one device, at most: more devices than ``global_batch_size`` needs pass fewer each.
        global_batch_size: Rows of one optimizer step over all devices; default: ``batch_size`` times the number of devices.
        collate_fn: Makes a batch of rows.
        shuffle: Draw a new order each epoch, from ``seed`` and the epoch's number alone.
        drop_last: Leave out the rows that do not fill a global batch (training); otherwise repeat rows, marked by a
            negative ``sample_id``, so that all ranks make equally many batches (evaluation; on one device the last batch is short).
        row_tokens: Number of loss-bearing tokens of each row; given, every batch carries ``num_step_tokens``.
        seed: Seed of the order.
        num_workers: Worker processes.

    Raises:
        ValueError: If the rows of a step cannot be dealt evenly.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | DataLoader[Any] | Sequence[Any],
        batch_size: int = 1,
        *,
        global_batch_size: int | None = None,
        collate_fn: Callable[[Sequence[Any]], BatchT] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        row_tokens: Sequence[int] | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if isinstance(dataset, DataLoader):
            batch_size = dataset.batch_size or batch_size
            collate_fn = cast("Callable[[Sequence[Any]], BatchT]", dataset.collate_fn)
            num_workers = dataset.num_workers
            dataset = dataset.dataset
        if collate_fn is None:
            raise ValueError("PhasedLoader needs a collate_fn that makes a Batch, e.g. malleable.datamodules.batch.collate")
        self.pool: Any = dataset
        self.max_batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.collate_fn = collate_fn
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = num_workers
        self._epoch = 0
        self._restored = {"epoch": -1, "position": 0}
        self._position = 0
        self.views: dict[str, Any] = {}
        self.show(dataset, row_tokens)

    def view(self, name: str) -> Any:
        """Return another view of the same data, which a data module put into ``views``: rows, or a callable that makes them.

        Raises:
            KeyError: If there is no such view.
        """
        if name not in self.views:
            raise KeyError(f"the training loader has no view {name!r}, only {sorted(self.views)}; use a data module that offers it, or set `views`")
        rows = self.views[name]
        return rows() if callable(rows) else rows

    def show(self, rows: Dataset[Any] | Sequence[Any], row_tokens: Sequence[int] | Tensor | None = None, batch_factor: int = 1) -> None:
        """Take these rows from the next epoch on.

        Args:
            rows: Map-style dataset or sequence of what ``collate_fn`` takes.
            row_tokens: Loss-bearing tokens of each row.
            batch_factor: How many times the rows of a pass and of an optimizer step; the accumulation stays the same.
        """
        self.dataset: Any = rows
        self.batch_factor = batch_factor
        self._position = 0
        self.row_tokens = None if row_tokens is None else torch.as_tensor(row_tokens)

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass on this device; DeepSpeed reads it too."""
        return deal(self.max_batch_size, self.global_batch_size).rows * self.batch_factor

    @property
    def accumulation(self) -> int:
        """Batches of one rank that make an optimizer step."""
        return deal(self.max_batch_size, self.global_batch_size).batches

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        count = len(self.dataset)
        return count // self.rows_per_step if self.drop_last else -(-count // self.rows_per_step)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all devices."""
        return self.accumulation * self.batch_size * world()[1]

    def __len__(self) -> int:
        """Return the number of batches of this rank in an epoch."""
        if self.drop_last:
            return self.num_steps * self.accumulation
        return -(-len(self.dataset) // (self.batch_size * world()[1]))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch to come."""
        self._epoch = epoch

    @property
    def sampler(self) -> PhasedLoader[BatchT]:
        """The object whose ``set_epoch`` the Trainer calls before each epoch."""
        return self

    @property
    def batch_sampler(self) -> PhasedLoader[BatchT]:
        """The object that DeepSpeed asks for the ``batch_size``."""
        return self

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the running epoch were handed out."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start that epoch, and no other, after the batches already handed out."""
        self._restored = dict(state)

    def _order(self) -> Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        generator = torch.Generator().manual_seed((self.seed << 20) + self._epoch)
        return torch.randperm(count, generator=generator)

    def _batches(self) -> list[tuple[Tensor, int, float | None]]:
        """Positions, number of padding rows and step normaliser of every batch of this rank."""
        rank, size = world()
        order = self._order()
        count = len(self) * self.batch_size * size
        padding = max(0, count - len(order))
        rows = torch.cat([order, order.new_zeros(padding)])[:count]
        real = torch.arange(count) < len(order)
        chunks = self.accumulation if self.drop_last else 1
        # (step, batch of the step, rank, row): consecutive rows make a step whatever the number of devices.
        shape = (-1, chunks, size, self.batch_size)
        rows, real = rows.reshape(shape), real.reshape(shape)
        batches = []
        for step_rows, step_real in zip(rows, real, strict=True):
            tokens = None
            if self.row_tokens is not None:
                tokens = self.row_tokens[step_rows[step_real]].sum().item() / (chunks * size)
            batches += [(step_rows[chunk, rank], int((~step_real[chunk, rank]).sum()), tokens) for chunk in range(chunks)]
        if size == 1 and padding:
            # No rank waits for another, so the last batch may be short: `trainer.predict` then returns each row once.
            last, _, tokens = batches[-1]
            batches[-1] = (last[: len(last) - padding], 0, tokens)
        return batches

    def __iter__(self) -> Iterator[BatchT]:
        """Yield this rank's batches, from where a restored state left off."""
        batches = self._batches()
        # A run that was killed after an epoch's last batch goes on with the next epoch.
        start = self._restored["position"] if self._restored["epoch"] == self._epoch else 0
        self._restored["epoch"] = -1
        self._position = start
        loader: DataLoader[BatchT] = DataLoader(
            self.dataset,
            batch_sampler=[rows.tolist() for rows, _, _ in batches[start:]],
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
        )
        for (_, padding, tokens), batch in zip(batches[start:], loader, strict=True):
            self._position += 1
            yield self._finish(batch, padding, tokens)

    def _finish(self, batch: BatchT, padding: int, tokens: float | None) -> BatchT:
        if padding:
            sample_id = batch.sample_id.clone()
            sample_id[len(sample_id) - padding :] = -1 - sample_id[len(sample_id) - padding :]
            batch = replace(batch, sample_id=sample_id)
        if tokens is not None and hasattr(batch, "num_step_tokens"):
            batch = replace(batch, num_step_tokens=torch.tensor(tokens))  # type: ignore[call-arg]
        return batch
