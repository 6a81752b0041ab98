"""Training of a sequential recommender on the rows of a data module, as a baseline of a report."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from malleable.datamodules.sample_ids import keyed_order
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.ranks import world_size
from malleable.lightning_modules.functional.schedule import warmup_decay
from malleable.lightning_modules.recommendation.sequential import SequentialRecommender

log = logging.getLogger(__name__)

TARGETS = 2048  # of a step


@float32_by_default()
def train_baseline(module: SequentialRecommender, source: Any, epochs: int, seed: int, device: torch.device) -> None:
    """Train a recommender outside the Trainer, and freeze it.

    All ranks train on all rows; then rank 0 sends its weights to the others, so that their results are equal. The learning rate follows
    ``tuning`` of the recommender. The generators of the caller do not change.

    Args:
        module: Recommender with a catalogue, without weights.
        source: Data module with ``sequence_dataset``.
        epochs: Number of passes over the rows.
        seed: Seed of weights, dropout and order.
        device: Device to train on.

    Raises:
        MisconfigurationException: If the data module has no rows for sequence models.
    """
    rows = getattr(source, "sequence_dataset", None)
    if rows is None:
        raise MisconfigurationException(
            f"Baselines trains a SequentialRecommender on `sequence_dataset`, which {type(source).__name__} does not have; use "
            "RecommendationDataModule"
        )
    devices = [device] if device.type == "cuda" else []
    started = time.monotonic()
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        module.configure_model()
        module.to(device).train()
        batches = _batches(rows)
        optimizer = module.tuning.optimizer(module.parameter_groups())
        step, total = 0, epochs * len(batches)
        for module.sampling_epoch in range(epochs):
            for number in keyed_order(np.arange(len(batches)), seed, module.sampling_epoch).tolist():
                batch = rows.collate([rows[index] for index in batches[number]]).to(device)
                for group in optimizer.param_groups:
                    group["lr"] = module.tuning.lr * warmup_decay(step, total, module.tuning.warmup_steps, module.tuning.decay)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(module.compute_loss(batch).loss)
                optimizer.step()
                step += 1
    if world_size() > 1:
        for tensor in module.state_dict().values():
            _broadcast(tensor)
    module.eval().requires_grad_(False)
    log.info("trained a %s (%s) as a baseline: %d epochs, %.0f s", type(module).__name__, module.encoder.kind, epochs, time.monotonic() - started)


def _batches(rows: Any) -> list[list[int]]:
    """Return the rows of each batch: rows of similar length, with about ``TARGETS`` targets."""
    lengths = np.array([sum(window.length for window in row) for row in rows.rows])
    batches: list[list[int]] = [[]]
    size = 0
    for index in lengths.argsort(kind="stable").tolist():
        if size and size + lengths[index] > TARGETS:
            batches.append([])
            size = 0
        batches[-1].append(index)
        size += int(lengths[index])
    return batches


def _broadcast(tensor: Tensor) -> None:
    torch.distributed.broadcast(tensor, 0)
