"""Checks for settings of the Trainer that cannot be used with self-play."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from malleable.callbacks.self_play.phases import Phase


def check_limits(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Check that no limit has no effect or would end a run in the middle of a round.

    Args:
        trainer: Trainer, before training.
        phases: Phase of each epoch.

    Raises:
        MisconfigurationException: If ``max_epochs`` is set, or if there is an ``EarlyStopping`` callback.
    """
    epochs = len(phases)
    # Lightning uses 1000 if no limit is given.
    if trainer.max_epochs not in (None, -1, 1000, epochs):
        raise MisconfigurationException(
            f"max_epochs={trainer.max_epochs} has no effect: SelfPlayLoop sets the number of epochs, {epochs} with these settings. Omit it or set it "
            "to -1; to change the number, set `rounds` of the loop or `epochs` of its phases"
        )
    if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "EarlyStopping could end the run in the middle of a round of SelfPlayLoop, because metrics of supervised and preference phases differ; "
            "remove it, and set the number of `rounds`"
        )
    rounds = [epoch for epoch, phase in enumerate(phases, 1) if phase.round and (epoch == epochs or phases[epoch].round > phase.round)]
    every = trainer.check_val_every_n_epoch
    if every and rounds and not any(epoch % every == 0 for epoch in rounds):
        rank_zero_info(
            f"no round ends with a validation (check_val_every_n_epoch={every}, the first round ends after epoch {rounds[0]}), so the report has "
            "no curves over rounds; change check_val_every_n_epoch or the epochs of the warm-up"
        )


def check_rounds(rows_per_step: Mapping[str, int], rows: int) -> None:
    """Check that a round has enough rows for an optimizer step.

    Args:
        rows_per_step: Number of rows of an optimizer step, by kind of phase.
        rows: Number of rows of a round.

    Raises:
        MisconfigurationException: If a phase would have no optimizer step.
    """
    for kind, needed in rows_per_step.items():
        if rows < needed:
            raise MisconfigurationException(
                f"a round has {rows} rows, but an optimizer step of the {kind} phase needs {needed}; raise rows_per_round, or lower the global batch "
                "size or the batch_factor of the phase"
            )
