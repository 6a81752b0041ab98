"""Distributed passes over rows outside the loops of the Trainer, e.g. to generate answers or to compute reference log-probabilities."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from malleable.datamodules.batch import Batch
from malleable.datamodules.loading import PhasedLoader
from malleable.lightning_modules.functional.defaults import float32_by_default

log = logging.getLogger(__name__)

REPORT_EVERY_S = 10.0


@contextmanager
def inference_mode(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Context with evaluation mode, without gradients and with the precision of the Trainer. The previous modes are restored at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context(), float32_by_default():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def rows_per_pass(trainer: Trainer, loader: PhasedLoader[Any]) -> int:
    """Return the batch size of passes without gradients: ``eval_batch_size`` of the data module, or the batch size of training if it has none."""
    size: int | None = getattr(getattr(trainer, "datamodule", None), "eval_batch_size", None)
    return size or loader.max_batch_size


def apply_to_rows(
    trainer: Trainer,
    module: LightningModule,
    rows: Any,
    collate_fn: Callable[[Sequence[Any]], Any],
    batch_size: int,
    function: Callable[[Any], Tensor],
    label: str,
) -> Tensor:
    """Apply a function to all rows, distributed over the ranks, and gather the results in the order of the rows.

    All ranks call the function equally often, so it can contain collective operations.

    Args:
        trainer: Trainer, for device and precision.
        module: Module, set to evaluation mode during the pass.
        rows: Map-style dataset, the same on every rank.
        collate_fn: Function that converts rows to a batch.
        batch_size: Number of rows of a batch on one rank.
        function: Function that maps a batch to a tensor ``(B, ...)``, whose shape except for B is the same for all batches.
        label: Label of the progress messages.

    Returns:
        Results ``(len(rows), ...)`` on the CPU, the same on all ranks.
    """
    pin = trainer.strategy.root_device.type == "cuda"
    loader: PhasedLoader[Any] = PhasedLoader(rows, batch_size, collate_fn=collate_fn, shuffle=False, drop_last=False, pin_memory=pin)
    results, start, last = [], time.monotonic(), time.monotonic()
    with inference_mode(trainer, module):
        for number, batch in enumerate(loader, 1):
            moved: Batch = trainer.strategy.batch_to_device(batch)
            results.append(function(moved))
            if time.monotonic() - last > REPORT_EVERY_S or number == len(loader):
                last = time.monotonic()
                rank_zero_info(f"{label}: {min(number * batch_size * trainer.world_size, len(rows))} of {len(rows)} rows, {last - start:.1f} s")
    own = torch.cat(results)
    gathered = cast("Tensor", module.all_gather(own))
    if trainer.world_size == 1:
        return gathered.cpu()[: len(rows)]
    # Batches are assigned to the ranks in turn, so the order of rows is (batch, rank, row of the batch).
    shape = (trainer.world_size, -1, batch_size, *own.shape[1:])
    return gathered.reshape(shape).transpose(0, 1).flatten(0, 2).cpu()[: len(rows)]
