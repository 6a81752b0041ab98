"""Resuming where Lightning itself does not resume well."""

from __future__ import annotations

from lightning.pytorch import Trainer


def begin_epoch(trainer: Trainer) -> bool:
    """Make a run that resumes after an epoch's last batch begin the next epoch at its first; to be called in ``on_train_start``.

    From a checkpoint taken there, Lightning goes on as if in the middle of the next epoch: its start is left out, and, unless it
    has as many batches as the epoch before, those count as its own.

    Returns:
        True if the run resumes there: the caller must then do itself what it does in ``on_train_epoch_start``.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    if not (loop.restarted_mid_epoch and batches.is_last_batch and trainer.current_epoch == loop.epoch_progress.current.ready):
        return False
    loop.epoch_progress.increment_ready()
    loop.epoch_progress.increment_started()
    batches.increment_completed()
    loop.epoch_loop.restarting = False
    return True
