"""Training of a sequential recommender on the rows of a data module, as a baseline of a report."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from malleable.datamodules.sample_ids import keyed_order
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.ranks import world_size
from malleable.lightning_modules.functional.schedule import warmup_decay
from malleable.lightning_modules.recommendation.sequential import SequentialRecommender

log = logging.getLogger(__name__)

PACK_LENGTH = 256
"""Number of items of a training row, which is a step; more if histories are longer. Larger steps are less accurate."""


@float32_by_default()
def train_baseline(module: SequentialRecommender, source: Any, epochs: int, seed: int, device: torch.device) -> None:
    """Train a recommender outside the Trainer, and freeze it.

    All ranks train on all rows; then rank 0 sends its weights to the others, so that their results are equal. The learning rate follows
    ``tuning`` of the recommender. The generators of the caller do not change.

    Args:
        module: Recommender with a catalogue, without weights.
        source: Data module with the method ``sequence_rows``.
        epochs: Number of passes over the rows.
        seed: Seed of weights, dropout and order.
        device: Device to train on.

    Raises:
        MisconfigurationException: If the data module has no rows for sequence models.
    """
    if not hasattr(source, "sequence_rows"):
        raise MisconfigurationException(
            f"Baselines trains a SequentialRecommender on rows of items, which {type(source).__name__} does not have; use RecommendationDataModule"
        )
    length = module.encoder.max_length
    rows = source.sequence_rows(max_length=length, pack_length=max(PACK_LENGTH, length + 1))
    devices = [device] if device.type == "cuda" else []
    started = time.monotonic()
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        module.configure_model()
        module.to(device).train()
        optimizer = module.tuning.optimizer(module.parameter_groups())
        step, total = 0, epochs * len(rows)
        log.info("training a %s (%s) for the report: %d steps", type(module).__name__, module.encoder.kind, total)
        for module.sampling_epoch in range(epochs):
            for index in keyed_order(rows.sample_ids, seed, module.sampling_epoch).tolist():
                batch = rows.collate([rows[index]]).to(device)
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


def _broadcast(tensor: Tensor) -> None:
    torch.distributed.broadcast(tensor, 0)
