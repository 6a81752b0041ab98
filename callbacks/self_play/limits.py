"""Limits of a Trainer that do not go with self-play."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping


def check_limits(trainer: Trainer, epochs: int) -> None:
    """Refuse what would end a run of self-play in the middle of a round, or would have no effect.

    Args:
        trainer: Before it trains.
        epochs: What the loop will train.

    Raises:
        MisconfigurationException: If there is such a limit.
    """
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
