"""One pass over rows outside the training loop, shared among ranks: what generation and reference passes have in common."""

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
def inference(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, the Trainer's precision; training mode returns afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context(), float32_by_default():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def rows_per_pass(trainer: Trainer, loader: PhasedLoader[Any]) -> int:
    """Rows of a pass without gradients: the data module's ``eval_batch_size``, or as many as in training where there is none."""
    size: int | None = getattr(getattr(trainer, "datamodule", None), "eval_batch_size", None)
    return size or loader.max_batch_size


def sweep(
    trainer: Trainer,
    module: LightningModule,
    rows: Any,
    collate_fn: Callable[[Sequence[Any]], Any],
    batch_size: int,
    function: Callable[[Any], Tensor],
    label: str,
) -> Tensor:
    """Apply ``function`` to all rows, each rank to its share, and gather the results in the order of the rows.

    All ranks make equally many calls, so ``function`` may hold collectives.

    Args:
        trainer: Moves batches and knows the precision.
        module: Evaluated without dropout and gradients.
        rows: Map-style rows, the same on every rank.
        collate_fn: Makes a batch of rows.
        batch_size: Rows a call on one rank.
        function: Maps a batch to ``(B, ...)``, of one shape behind B for all batches.
        label: What the progress lines say.

    Returns:
        ``(len(rows), ...)`` on the CPU, equal on all ranks.
    """
    pin = trainer.strategy.root_device.type == "cuda"
    loader: PhasedLoader[Any] = PhasedLoader(rows, batch_size, collate_fn=collate_fn, shuffle=False, drop_last=False, pin_memory=pin)
    results, start, last = [], time.monotonic(), time.monotonic()
    with inference(trainer, module):
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
    # Rows are dealt batch by batch, so the order is (batch, rank, row of the batch).
    shape = (trainer.world_size, -1, batch_size, *own.shape[1:])
    return gathered.reshape(shape).transpose(0, 1).flatten(0, 2).cpu()[: len(rows)]
