"""Resuming where Lightning itself does not resume well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer


def finish_epoch(trainer: Trainer) -> None:
    """Finish an epoch whose last batch was trained when the checkpoint was saved; to be called in ``on_train_start``.

    From a checkpoint taken there, Lightning leaves out the validation and the hooks of the epoch's end, and goes on as if in the middle of the
    next epoch: its start is left out, and, unless it has as many batches as the epoch before, those count as its own. Here the epoch is
    validated, if that is due, and ended; the next one then begins at its first batch. A second call does nothing.
    """
    loop = trainer.fit_loop
    epoch_loop, batches = loop.epoch_loop, loop.epoch_loop.batch_progress
    if not (loop.restarted_mid_epoch and epoch_loop.restarted_on_train_batch_end and batches.is_last_batch):
        return
    progress: Any = loop.epoch_progress  # whose counts are declared as those of a simpler kind
    for counts in (progress.current, progress.total):
        # Lightning has counted the epoch as finished.
        counts.processed -= 1
        counts.completed -= 1
    batches.increment_completed()
    epoch_loop._batches_that_stepped += 1
    # Not by the setter of the outer loop, which leaves all loops restarting where `max_steps` is given: the validation would go on behind the
    # batches of an earlier one.
    loop._restarting = False
    epoch_loop.restarting = False
    val_batches = trainer.val_check_batch
    if epoch_loop._should_check_val_epoch() and (val_batches is None or val_batches == float("inf") or batches.current.ready % val_batches == 0):
        trainer.validating = True
        epoch_loop.val_loop.run()
        trainer.training = True
    loop.on_advance_end()
    loop.on_iteration_done()


def reopen(trainer: Trainer, checkpoint: Mapping[str, Any]) -> int | None:
    """Let a run enter its loop whose `max_steps` were reached when the checkpoint was saved after the last batch of an epoch.

    Lightning would leave it out, and so the validation and the end of that epoch. To be called in ``on_load_checkpoint``; the limit is raised by a
    step until :func:`finish_epoch` has ended the epoch.

    Returns:
        The limit to set again after :func:`finish_epoch`, ``None`` where it was not changed.
    """
    states = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = (states.get(name, {}) for name in ("epoch_progress", "epoch_loop.batch_progress"))
    limit, step = trainer.max_steps, checkpoint.get("global_step", 0)
    if not 0 <= limit <= step or not batches.get("is_last_batch") or epochs["total"]["processed"] != epochs["total"]["started"] - 1:
        return None
    trainer.fit_loop.epoch_loop.max_steps = step + 1
    return limit
