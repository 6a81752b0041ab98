"""Corrections of how Lightning resumes a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer


def finish_epoch(trainer: Trainer) -> None:
    """Finish an epoch if the checkpoint was saved after its last batch and before its end. Call this function in ``on_train_start``.

    When Lightning resumes from such a checkpoint, it skips the validation and the hooks at the end of the epoch. It also skips the hooks at the start
    of the next epoch. If the next epoch has a different number of batches, Lightning counts the batches of the finished epoch as batches of the next
    one. This function runs the validation, if it is due, and ends the epoch. The next epoch then starts at its first batch. A second call has no
    effect.
    """
    loop = trainer.fit_loop
    epoch_loop, batches = loop.epoch_loop, loop.epoch_loop.batch_progress
    if not (loop.restarted_mid_epoch and epoch_loop.restarted_on_train_batch_end and batches.is_last_batch):
        return
    progress: Any = loop.epoch_progress  # Any, because the declared type of its counts lacks attributes
    for counts in (progress.current, progress.total):
        # Lightning has already counted the epoch as finished.
        counts.processed -= 1
        counts.completed -= 1
    batches.increment_completed()
    epoch_loop._batches_that_stepped += 1
    # The setter of the outer loop is not used: with `max_steps`, all loops would stay in the state `restarting`, and the validation would skip the
    # batches of an earlier validation.
    loop._restarting = False
    epoch_loop.restarting = False
    val_batches = trainer.val_check_batch
    if epoch_loop._should_check_val_epoch() and (val_batches is None or val_batches == float("inf") or batches.current.ready % val_batches == 0):
        trainer.validating = True
        epoch_loop.val_loop.run()
        trainer.training = True
    loop.on_advance_end()
    loop.on_iteration_done()


def extend_max_steps(trainer: Trainer, checkpoint: Mapping[str, Any]) -> int | None:
    """Increase ``max_steps`` if it was reached when the checkpoint was saved after the last batch of an epoch. Call this in ``on_load_checkpoint``.

    Otherwise, Lightning would not enter its loop, and would omit the validation and the end of the epoch.

    Returns:
        The original limit, to be restored after :func:`finish_epoch`; ``None`` if it was not changed.
    """
    states = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = (states.get(name, {}) for name in ("epoch_progress", "epoch_loop.batch_progress"))
    limit, step = trainer.max_steps, checkpoint.get("global_step", 0)
    if not 0 <= limit <= step or not batches.get("is_last_batch") or epochs["total"]["processed"] != epochs["total"]["started"] - 1:
        return None
    trainer.fit_loop.epoch_loop.max_steps = step + 1
    return limit
