"""The training loader: global batches, shards by rank, exact resumption, and rows that may change between epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from malleable.datamodules.batch import Batch
from malleable.datamodules.row_reader import RowReader, options_of

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


class Share(NamedTuple):
    """What one rank gets of an optimizer step in one batch.

    Attributes:
        rows: ``(B,)`` positions in the dataset.
        padding: How many of them, at the end, only fill the batch.
        step_tokens: Loss-bearing tokens of the whole step, divided by its batches over all ranks; ``None`` where unknown.
        step_rows: The same for rows.
    """

    rows: Tensor
    padding: int
    step_tokens: float | None
    step_rows: float | None


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
        dataset: Rows with a length. A :class:`torch.utils.data.DataLoader` is taken apart: its batch size, shuffling, last batch, collation, pinning
            and workers are the defaults of the other arguments; a sampler, batch sampler, generator or iterable dataset is refused. Of a
            dataset that :class:`MakesBatches`, whole batches are asked for; it needs neither collation nor workers.
        batch_size: Rows of one forward pass on one device, at most: more devices than ``global_batch_size`` needs pass fewer each; default: 1.
        global_batch_size: Rows of one optimizer step over all devices; default: ``batch_size`` times the number of devices.
        collate_fn: Makes a batch of rows; a dataset with a method ``collate`` says itself which batch its rows make.
        shuffle: Draw a new order each epoch, from ``seed`` and the epoch's number alone; default: True.
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
        ValueError: If the rows of a step cannot be dealt evenly, or a DataLoader has what cannot be kept.
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
        self.max_batch_size: int = options.pop("batch_size")
        self.global_batch_size = global_batch_size
        self.shuffle: bool = options.pop("shuffle")
        self.drop_last: bool = options.pop("drop_last")
        self.pin_memory: bool = options.pop("pin_memory")
        self.seed = seed
        self._worker_options = options
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
        self._reader = RowReader(rows, getattr(rows, "collate", None) or self.collate_fn, **self._worker_options)
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
        return self.num_steps * self.accumulation

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
        """Return how many batches of the running epoch were handed out, and what those batches depend on."""
        return {"epoch": self._epoch, "position": self._position, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start that epoch, and no other, after the batches already handed out; iteration then refuses batches of another layout."""
        self._restored = dict(state)

    def _layout(self) -> dict[str, int]:
        """Return what decides the batches of an epoch, by the words of a message."""
        return {"rows": len(self.dataset), "rows of a step": self.rows_per_step, "batches of a step": self.accumulation, "seed": self.seed}

    def _start(self) -> int:
        """Return the number of batches of the epoch that were handed out before the run was interrupted."""
        state, self._restored = self._restored, {"epoch": -1, "position": 0}
        # A run that was killed after an epoch's last batch goes on with the next epoch.
        if state["epoch"] != self._epoch:
            return 0
        # Checkpoints of earlier versions store the position alone.
        other = [f"{name} {state[name]} then, {value} now" for name, value in self._layout().items() if state.get(name, value) != value]
        if state["position"] and other:
            raise ValueError(
                f"the checkpoint was written within epoch {self._epoch}, after {state['position']} batches of another layout ({', '.join(other)}): "
                "the rows that are left are unknown; resume with the batch_size, global_batch_size, devices, data and seed of that run, or "
                "from a checkpoint written at the end of an epoch"
            )
        return state["position"]

    def _order(self) -> Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        generator = torch.Generator().manual_seed((self.seed << 20) + self._epoch)
        return torch.randperm(count, generator=generator)

    def _shares(self) -> list[Share]:
        """What this rank gets, batch by batch."""
        rank, size = world()
        order = self._order()
        # (step, batch of the step, rank, row): consecutive rows make a step whatever the number of devices.
        shape = (self.num_steps, self.accumulation, size, self.batch_size)
        count = math.prod(shape)
        rows = torch.cat([order, order.new_zeros(max(0, count - len(order)))])[:count]
        real = torch.arange(count) < len(order)
        tokens: list[float] | list[None] = [None] * self.num_steps
        totals: list[float] | list[None] = tokens
        if self.row_tokens is not None:
            batches = self.accumulation * size
            tokens = [total / batches for total in (self.row_tokens[rows] * real).reshape(self.num_steps, -1).sum(1).tolist()]
            totals = [total / batches for total in real.reshape(self.num_steps, -1).sum(1).tolist()]
        rows, real = (part.reshape(shape)[:, :, rank].flatten(0, 1) for part in (rows, real))
        padding = (~real).sum(1).tolist()
        shares = []
        for number, (own, repeated) in enumerate(zip(rows.unbind(), padding, strict=True)):
            step = number // self.accumulation
            if size == 1 and repeated:
                # No rank waits for another, so the last batches may be short: `trainer.predict` then returns each row once.
                own = own[: max(1, len(own) - repeated)]
                repeated = int(repeated == self.batch_size)
            shares.append(Share(own, repeated, tokens[step], totals[step]))
        return shares

    def __iter__(self) -> Iterator[BatchT]:
        """Yield this rank's batches, from where a restored state left off.

        Raises:
            ValueError: If the restored state lies within an epoch whose batches had another layout.
        """
        shares = self._shares()
        start = self._position = self._start()
        shares = shares[start:]
        for share, batch in zip(shares, self._made(shares), strict=True):
            self._position += 1
            finished = _finish(batch, share)
            # Here and not by the DataLoader, so that the normalisers are pinned too: one pageable copy would wait for the device.
            yield finished.pin_memory() if self.pin_memory else finished

    def stop_workers(self) -> None:
        """End the worker processes; they start again with the next batches."""
        self._reader.stop()

    def _made(self, shares: Sequence[Share]) -> Iterable[BatchT]:
        if isinstance(self.dataset, MakesBatches):
            return (cast("BatchT", self.dataset.make_batch(share.rows)) for share in shares)
        return self._reader.read([share.rows.tolist() for share in shares])


def _finish(batch: BatchT, share: Share) -> BatchT:
    """Mark the repeated rows and give the normalisers of the step."""
    changed: dict[str, Tensor] = {}
    if share.padding:
        first = len(batch.sample_id) - share.padding
        changed["sample_id"] = torch.cat([batch.sample_id[:first], -1 - batch.sample_id[first:]])
    for name, value in (("num_step_tokens", share.step_tokens), ("num_step_rows", share.step_rows)):
        if value is not None and hasattr(batch, name):
            changed[name] = torch.tensor(value)
    return batch.replace(**changed) if changed else batch
