"""Resuming where Lightning itself does not resume well."""

from __future__ import annotations

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
    loop.restarting = False
    val_batches = trainer.val_check_batch
    if epoch_loop._should_check_val_epoch() and (val_batches is None or val_batches == float("inf") or batches.current.ready % val_batches == 0):
        trainer.validating = True
        epoch_loop.val_loop.run()
        trainer.training = True
    loop.on_advance_end()
    loop.on_iteration_done()
