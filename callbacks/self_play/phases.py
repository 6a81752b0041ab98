"""Phases of self-play as plain data: settings, schedule, and the state of a run for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from malleable.lightning_modules.functional.number_checks import check_numbers


@dataclass
class PhaseSettings:
    """Settings of one kind of phase.

    Attributes:
        epochs: Number of epochs; 0 omits the phase.
        lr: Maximum learning rate.
        warmup_steps: Number of optimizer steps with a linear increase of the learning rate.
        decay: Shape of the decrease of the learning rate, from the end of the increase to the end of the phase.
        view: Training rows: ``answer`` for prompts with answers, ``packed`` for the packed histories of the data module.
        rows: Number of rows of the warm-up, which are drawn once; ``None`` uses all rows. The other phases use ``rows_per_round``.
        batch_factor: Factor by which batch size and rows of an optimizer step are larger than those of the loader. A prompt with its answer is much
            shorter than a packed row, so more rows fit into a batch, and larger steps have less noise.
    """

    epochs: int = 1
    lr: float = 2e-5
    warmup_steps: int = 20
    decay: Literal["linear", "cosine", "constant"] = "linear"
    view: Literal["answer", "packed"] = "answer"
    rows: int | None = None
    batch_factor: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "phase.", at_least={"epochs": 0, "warmup_steps": 0, "rows": 1, "batch_factor": 1})
        if not self.lr > 0:
            raise ValueError(f"phase.lr must be > 0, got {self.lr}; to omit the phase, set its epochs to 0")


class Phase(NamedTuple):
    """Phase of an epoch.

    Attributes:
        kind: ``warmup``, ``sft`` or ``dpo``.
        round: Number of the round, from 1; 0 for the warm-up.
        epoch: Index of the epoch within the phase, from 0.
    """

    kind: str
    round: int
    epoch: int


def plan_phases(rounds: int, epochs: Mapping[str, int]) -> list[Phase]:
    """Return the phase of each epoch of a run.

    Args:
        rounds: Number of rounds of self-play.
        epochs: Number of epochs of ``warmup``, ``sft`` and ``dpo``.
    """
    order = [("warmup", 0)] + [(kind, number) for number in range(1, rounds + 1) for kind in ("sft", "dpo")]
    return [Phase(kind, number, epoch) for kind, number in order for epoch in range(epochs[kind])]


@dataclass
class SelfPlayState:
    """State of a run for checkpoints, as plain data.

    Attributes:
        epoch: Epoch whose rows are set in the loader; -1 before the first.
        path: File of the current round, relative to the run folder.
        digest: Checksum of the content of this file.
        history: Name and logged metrics of each finished phase, and statistics of the answers of each round. Validation metrics are included only if
            the model was validated at the end of the phase.
        before: Output of :func:`~malleable.callbacks.report.comparison.evaluate_recommender` after the warm-up.
        figures: Last value of each metric logged in the current phase.
        validated: Last epoch with a validation at its end; -1 before the first.
        marks: First optimizer step of each phase, and ``supervised`` or ``preference``.
    """

    epoch: int = -1
    path: str | None = None
    digest: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    marks: list[list[Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    validated: int = -1

    def finish(self, phase: Phase, epoch: int) -> None:
        """Add the metrics of a phase to the history.

        Args:
            phase: The phase.
            epoch: Last epoch of the phase. Validation metrics of earlier epochs are omitted.
        """
        figures = {name: value for name, value in self.figures.items() if self.validated == epoch or not name.startswith("val_")}
        self.history.append({"phase": phase.kind, "round": phase.round, **figures})


def reset_moments(optimizer: Any) -> None:
    """Set the state of an optimizer to zero in place, as in a new optimizer. Also works for optimizers that DeepSpeed wraps."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
