"""Ranks of individual test rows, collected in addition to the sums of a metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


class RowRanks:
    """Ranks of the true answers of all rows. A metric whose attribute ``row_ranks`` is an instance of this class adds its ranks to it."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, sample_id: Tensor, target: Tensor, ranks: Tensor) -> None:
        """Add rows.

        Args:
            sample_id: ``(B,)``; rows with a negative id are left out by :meth:`gather`.
            target: ``(B,)`` true answer.
            ranks: ``(B,)`` rank of the true answer, ``inf`` if it is not in the list.
        """
        self._parts.append((sample_id, target, ranks))

    def gather(self, device: torch.device) -> dict[str, Tensor]:
        """Return the rows of all processes on the CPU, in the order of their ids. All processes must call it, also those without rows.

        Args:
            device: Device of the collective operation.

        Returns:
            ``sample_id`` and ``target``, ``(R,)`` int64, and ``rank``, ``(R,)`` float32.
        """
        nothing = (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float32))
        parts = self._parts or [nothing]
        columns = [torch.cat(column).to(device, empty.dtype) for column, empty in zip(zip(*parts, strict=True), nothing, strict=True)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            columns = [torch.cat(gather_all_tensors(column)) for column in columns]
        sample_id, target, ranks = (column.cpu() for column in columns)
        real = sample_id >= 0
        order = sample_id[real].argsort(stable=True)
        return {"sample_id": sample_id[real][order], "target": target[real][order], "rank": ranks[real][order]}
