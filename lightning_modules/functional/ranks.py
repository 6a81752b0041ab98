"""Distribution of work over the ranks of a distributed run, with the same result on every rank.

Functions that communicate are collective: all ranks must call them. Without an initialised process group they behave as with one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights are partitioned by ZeRO stage 3 or FSDP."""
    marks = ("ds_id", "_is_flat_param", "device_mesh")
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks)


def shard(items: Sequence[T]) -> list[T]:
    """Return the items of this rank: every ``world_size``-th one."""
    return list(items[rank() :: world_size()])


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum a tensor over the ranks.

    Args:
        values: Tensor of the same shape on all ranks; ``nan`` on one rank gives ``nan`` in the sum.
        device: Device of the collective operation: the model's device.

    Returns:
        The sum, on the device of ``values``.
    """
    if world_size() == 1:
        return values
    total = values.to(device, copy=True)
    distributed.all_reduce(total)
    return total.to(values.device)


def largest_over_ranks(value: int, device: torch.device) -> int:
    """Return the largest value of all ranks."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def gather_over_ranks(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks; values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def merge_over_ranks(values: Mapping[int, T]) -> list[T]:
    """Return the values of all ranks as one list, ordered by key. The keys are ``0..N-1``, and each key is on one rank only."""
    merged = {key: value for part in gather_over_ranks(dict(values)) for key, value in part.items()}
    return [merged[key] for key in sorted(merged)]


def on_first_rank(make: Callable[[], T]) -> T:
    """Compute a value on the first rank and broadcast it.

    Args:
        make: Called on the first rank only; it must not be collective.

    Raises:
        Exception: On the first rank, the exception of ``make``.
        RuntimeError: On the other ranks, with the message of that exception.
    """
    if world_size() == 1:
        return make()
    value: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = make()
        except Exception as raised:  # the other ranks wait for a message in any case
            error = raised
    message = [value, None if error is None else f"{type(error).__name__}: {error}"]
    distributed.broadcast_object_list(message, 0)
    if error is not None:
        raise error
    if message[1] is not None:
        raise RuntimeError(f"the first rank failed: {message[1]}; see the traceback of the first rank")
    return message[0]  # type: ignore[no-any-return]


def stack_over_ranks(values: Tensor) -> Tensor:
    """Return the tensors of all ranks, ``(ranks, ...)``, on the device of ``values``; they must have the same shape on all ranks."""
    if world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.stack(parts)
