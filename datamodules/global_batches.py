"""Global batches: every optimizer step has the same rows on any number of devices."""

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
    """Rows of one batch of one rank.

    Attributes:
        rows: ``(B,)`` positions in the dataset.
        padding: Number of padding rows at the end.
        step_tokens: Mean number of tokens of a batch that contribute to the loss, over all batches of the optimizer step on all ranks; ``None`` if
            unknown.
        step_rows: Mean number of rows of a batch, over all batches of the optimizer step on all ranks; ``None`` if unknown.
    """

    rows: Tensor
    padding: int
    step_tokens: float | None
    step_rows: float | None


class StepLayout(NamedTuple):
    """Distribution of the rows of an optimizer step.

    Attributes:
        rows: Number of rows of a batch on one device.
        batches: Number of accumulated batches of each device.
    """

    rows: int
    batches: int


def step_layout(batch_size: int, global_batch_size: int | None) -> StepLayout:
    """Distribute the rows of an optimizer step over the devices.

    Args:
        batch_size: Maximum number of rows of a batch on one device.
        global_batch_size: Number of rows of an optimizer step over all devices. Default: ``batch_size`` times the number of devices.

    Raises:
        ValueError: If the rows of a step cannot be distributed evenly.
    """
    _, size = world()
    total = global_batch_size or batch_size * size
    per_rank = total // size
    rows = min(batch_size, per_rank)
    if total % size or per_rank % rows:
        raise ValueError(
            f"global_batch_size {total} must be a multiple of batch_size x devices = {batch_size} x {size}, or a smaller multiple of the number "
            f"of devices; change global_batch_size, batch_size or the number of devices"
        )
    return StepLayout(rows, per_rank // rows)


class GlobalBatchSampler:
    """Batch sampler of global batches, with shards for ranks and the position within an epoch.

    Step ``s`` of epoch ``e`` always has the same ``global_batch_size`` rows. They are sharded over the ranks, and split into batches of
    ``batch_size`` on each rank. The order of an epoch depends on the seed, the epoch and the ids of the rows; removing a row does not change the
    order of the others.

    Args:
        batch_size: Maximum number of rows of a batch on one device.
        global_batch_size: Number of rows of an optimizer step over all devices. Default: ``batch_size`` times the number of devices.
        shuffle: Use a new random order in each epoch.
        drop_last: Omit the rows that do not fill a global batch; otherwise rows are repeated.
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
            ids: ``(count,)`` ids that the order depends on; ``None``: the positions.
            row_tokens: Number of tokens of each row that contribute to the loss.
            batch_factor: Multiply the number of rows of a batch, and thereby of an optimizer step, by this factor; the accumulation does not change.
        """
        self.count = count
        self.ids = ids
        self.row_tokens = None if row_tokens is None else torch.as_tensor(row_tokens)
        self.batch_factor = batch_factor
        self.position = 0

    @property
    def batch_size(self) -> int:
        """Number of rows of a batch on this device; also read by DeepSpeed."""
        return step_layout(self.max_batch_size, self.global_batch_size).rows * self.batch_factor

    @property
    def accumulation(self) -> int:
        """Number of accumulated batches of one rank."""
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
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches so far, and the settings that the batches depend on."""
        return {"epoch": self.epoch, "position": self.position, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position in an epoch; if the layout of batches has changed, iteration raises an error."""
        self._restored = dict(state)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of this rank's rows, batch by batch."""
        return (shard.rows.tolist() for shard in self.shards())

    def shards(self) -> list[Shard]:
        """Return the batches of this rank, from the restored position on.

        Raises:
            ValueError: If the restored position is within an epoch, and its batches had another layout.
        """
        shards = self._all_shards()
        self.position = self._start()
        return shards[self.position :]

    def _layout(self) -> dict[str, int]:
        """Return the settings that the batches of an epoch depend on, with names for messages."""
        return {"rows": self.count, "rows of a step": self.rows_per_step, "batches of a step": self.accumulation, "seed": self.seed}

    def _start(self) -> int:
        """Return the number of batches of this epoch that were used before the run was interrupted."""
        state, self._restored = self._restored, {"epoch": -1, "position": 0}
        # A run that was killed after the last batch of an epoch resumes with the next epoch.
        if state["epoch"] != self.epoch:
            return 0
        other = [f"{name} {state[name]} then, {value} now" for name, value in self._layout().items() if state.get(name, value) != value]
        if state["position"] and other:
            raise ValueError(
                f"the checkpoint was written within epoch {self.epoch}, after {state['position']} batches of another layout ({', '.join(other)}): "
                "the remaining rows are unknown; resume with the batch_size, global_batch_size, devices, data and seed of that run, or "
                "from a checkpoint at the end of an epoch"
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
        # (step, batch of the step, rank, row): consecutive rows make a step for any number of devices.
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
                # Without other ranks, the last batches may be short, so that `trainer.predict` returns each row once.
                own = own[: max(1, len(own) - repeated)]
                repeated = int(repeated == self.batch_size)
            shards.append(Shard(own, repeated, tokens[step], totals[step]))
        return shards
