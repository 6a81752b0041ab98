"""Padding rows of distributed evaluation, which must not be counted twice.

Samplers repeat rows, so that all ranks have equally many batches. Such rows get a negative ``sample_id``, and losses and metrics skip rows with a
negative id. :class:`~malleable.datamodules.loading.PhasedLoader` marks the rows that it repeats. :func:`mark_padding_rows` marks those of PyTorch's
``DistributedSampler``, which Lightning adds to other loaders.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


def mark_padding_rows(sample_id: Tensor, trainer: Any, split: Literal["train", "val", "test"], batch_idx: int) -> Tensor:
    """Return the ids of a batch, negative for rows that a ``DistributedSampler`` has repeated to fill the last batch.

    Args:
        sample_id: ``(B,)`` int64; negative ids are not changed.
        trainer: Trainer with the loader of the split; ``None`` marks no row.
        split: Split of the batch.
        batch_idx: Number of the batch on this rank.

    Returns:
        ``(B,)`` int64.
    """
    if trainer is None:
        return sample_id
    loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}[split]
    loader = loaders[0] if isinstance(loaders, list) else loaders
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, DistributedSampler):
        return sample_id
    sampler = loader.sampler
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    first = batch_idx * (loader.batch_size or 1)
    position = first + torch.arange(len(sample_id), device=sample_id.device)
    return torch.where((position < own) | (sample_id < 0), sample_id, -1 - sample_id)
