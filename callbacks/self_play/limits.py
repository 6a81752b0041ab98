"""Limits of a Trainer that do not go with self-play."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from malleable.callbacks.self_play.phases import Phase


def check_limits(trainer: Trainer, phases: Sequence[Phase]) -> None:
    """Refuse what would end a run of self-play in the middle of a round, or would have no effect.

    Args:
        trainer: Before it trains.
        phases: What each epoch of the loop is.

    Raises:
        MisconfigurationException: If there is such a limit.
    """
    epochs = len(phases)
    # Lightning puts 1000 where no limit is given.
    if trainer.max_epochs not in (None, -1, 1000, epochs):
        raise MisconfigurationException(
            f"max_epochs={trainer.max_epochs} has no effect: SelfPlayLoop sets the epochs itself, {epochs} with these settings. Leave it out, or "
            "-1; for a shorter run, change the loop's `rounds` or the `epochs` of its phases"
        )
    if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "EarlyStopping would end the run in the middle of a round of SelfPlayLoop, whose supervised and preference phases have figures of "
            "their own; leave it out, and set the number of `rounds`"
        )
    rounds = [epoch for epoch, phase in enumerate(phases, 1) if phase.round and (epoch == epochs or phases[epoch].round > phase.round)]
    every = trainer.check_val_every_n_epoch
    if every and rounds and not any(epoch % every == 0 for epoch in rounds):
        rank_zero_info(
            f"no round ends in an epoch with a validation (check_val_every_n_epoch={every}, rounds end after epochs {rounds[0]}, ...): the report's "
            "picture of rounds lacks them; choose epochs of the warm-up, or check_val_every_n_epoch, so that they meet"
        )


def check_rounds(rows_per_step: Mapping[str, int], rows: int) -> None:
    """Refuse rounds that are shorter than an optimizer step.

    Args:
        rows_per_step: Rows of an optimizer step by kind of phase.
        rows: Rows of a round.

    Raises:
        MisconfigurationException: If a phase would have no step.
    """
    for kind, needed in rows_per_step.items():
        if rows < needed:
            raise MisconfigurationException(
                f"a round of {rows} rows does not fill one optimizer step of {needed} in the {kind} phase; raise rows_per_round, or lower the global "
                "batch size or the phase's batch_factor"
            )
