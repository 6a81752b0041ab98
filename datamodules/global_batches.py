"""Global batches: the same rows in every optimizer step, on any number of devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from malleable.datamodules.sample_ids import Ints, keyed_order


def world() -> tuple[int, int]:
    """Return ``(rank, world size)`` of this process, ``(0, 1)`` without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class Shard(NamedTuple):
    """The rows of an optimizer step that one rank gets in one batch.

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


class StepLayout(NamedTuple):
    """How the rows of an optimizer step are distributed.

    Attributes:
        rows: Rows of one forward pass on one device.
        batches: Passes of one device that make an optimizer step.
    """

    rows: int
    batches: int


def step_layout(batch_size: int, global_batch_size: int | None) -> StepLayout:
    """Distribute the rows of an optimizer step over the devices.

    Args:
        batch_size: Rows that one device can pass at once.
        global_batch_size: Rows of one optimizer step over all devices; default: one full batch of each.

    Raises:
        ValueError: If the rows of a step cannot be distributed evenly.
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
    return StepLayout(rows, share // rows)


class GlobalBatchSampler:
    """Batch sampler that owns global batches, shards and the position within an epoch.

    Step ``s`` of epoch ``e`` always holds the same ``global_batch_size`` rows. They are sharded over the ranks and, on each rank, cut into batches of
    ``batch_size``. The order of an epoch depends on the seed, the epoch and the ids of the rows: another row that is left out does not change it.

    Args:
        batch_size: Rows of one forward pass on one device, at most.
        global_batch_size: Rows of one optimizer step over all devices; default: ``batch_size`` times the number of devices.
        shuffle: Draw a new order each epoch.
        drop_last: Leave out the rows that do not fill a global batch; otherwise repeat rows.
        seed: Seed of the order.
    """

    def __init__(self, batch_size: int, global_batch_size: int | None = None, *, shuffle: bool = True, drop_last: bool = True, seed: int = 0) -> None:
        self.max_batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._restored = {"epoch": -1, "position": 0}
        self.set_rows(0)

    def set_rows(self, count: int, ids: Ints | None = None, row_tokens: Sequence[int] | Tensor | None = None, batch_factor: int = 1) -> None:
        """Set the rows of the next epochs.

        Args:
            count: Number of rows.
            ids: ``(count,)`` ids that the order depends on; ``None`` takes the positions.
            row_tokens: Loss-bearing tokens of each row.
            batch_factor: How many times the rows of a pass and of an optimizer step; the accumulation stays the same.
        """
        self.count = count
        self.ids = ids
        self.row_tokens = None if row_tokens is None else torch.as_tensor(row_tokens)
        self.batch_factor = batch_factor
        self.position = 0

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass on this device; DeepSpeed reads it too."""
        return step_layout(self.max_batch_size, self.global_batch_size).rows * self.batch_factor

    @property
    def accumulation(self) -> int:
        """Batches of one rank that make an optimizer step."""
        return step_layout(self.max_batch_size, self.global_batch_size).batches

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all devices."""
        return self.accumulation * self.batch_size * world()[1]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.count // self.rows_per_step if self.drop_last else -(-self.count // self.rows_per_step)

    def __len__(self) -> int:
        """Return the number of batches of this rank in an epoch."""
        return self.num_steps * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch to come."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the running epoch were handed out, and what those batches depend on."""
        return {"epoch": self.epoch, "position": self.position, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start that epoch, and no other, after the batches already handed out; iteration then refuses batches of another layout."""
        self._restored = dict(state)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of this rank's rows, batch by batch."""
        return (shard.rows.tolist() for shard in self.shards())

    def shards(self) -> list[Shard]:
        """Return what this rank gets, batch by batch, from where a restored state left off.

        Raises:
            ValueError: If the restored state lies within an epoch whose batches had another layout.
        """
        shards = self._all_shards()
        self.position = self._start()
        return shards[self.position :]

    def _layout(self) -> dict[str, int]:
        """Return what decides the batches of an epoch, by the names of a message."""
        return {"rows": self.count, "rows of a step": self.rows_per_step, "batches of a step": self.accumulation, "seed": self.seed}

    def _start(self) -> int:
        """Return the number of batches of the epoch that were handed out before the run was interrupted."""
        state, self._restored = self._restored, {"epoch": -1, "position": 0}
        # A run that was killed after an epoch's last batch goes on with the next epoch.
        if state["epoch"] != self.epoch:
            return 0
        other = [f"{name} {state[name]} then, {value} now" for name, value in self._layout().items() if state.get(name, value) != value]
        if state["position"] and other:
            raise ValueError(
                f"the checkpoint was written within epoch {self.epoch}, after {state['position']} batches of another layout ({', '.join(other)}): "
                "the rows that are left are unknown; resume with the batch_size, global_batch_size, devices, data and seed of that run, or "
                "from a checkpoint written at the end of an epoch"
            )
        return state["position"]

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.count)
        if self.ids is not None:
            return torch.from_numpy(keyed_order(self.ids, self.seed, self.epoch).astype(np.int64))
        return torch.randperm(self.count, generator=torch.Generator().manual_seed((self.seed << 20) + self.epoch))

    def _all_shards(self) -> list[Shard]:
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
        shards = []
        for number, (own, repeated) in enumerate(zip(rows.unbind(), padding, strict=True)):
            step = number // self.accumulation
            if size == 1 and repeated:
                # No rank waits for another, so the last batches may be short: `trainer.predict` then returns each row once.
                own = own[: max(1, len(own) - repeated)]
                repeated = int(repeated == self.batch_size)
            shards.append(Shard(own, repeated, tokens[step], totals[step]))
        return shards
