"""The phases of self-play as plain data: how each is trained, which comes when, and what a resumed run must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor


@dataclass
class PhaseSettings:
    """One kind of phase.

    Attributes:
        epochs: Passes over the phase's rows; 0 leaves the phase out.
        lr: Peak learning rate.
        warmup_steps: Optimizer steps of linear rise.
        decay: Course after the rise, over the whole phase.
        view: Rows the phase learns from: prompts with answers, or the data module's packed histories.
        rows: Rows of the warm-up, drawn once; ``None`` takes all. The later phases take ``rows_per_round``.
        batch_factor: Rows of a pass and of an optimizer step, as a multiple of the loader's: a prompt with its answer is short beside a
            packed row, and small steps are noisy ones.
    """

    epochs: int = 1
    lr: float = 2e-5
    warmup_steps: int = 20
    decay: Literal["linear", "cosine", "constant"] = "linear"
    view: Literal["answer", "packed"] = "answer"
    rows: int | None = None
    batch_factor: int = 1

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("epochs", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of a phase must be >= 0, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr of a phase must be > 0, got {self.lr}; epochs: 0 leaves the phase out")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows of a phase must be >= 1 or null, got {self.rows}")
        if self.batch_factor < 1:
            raise ValueError(f"batch_factor of a phase must be >= 1, got {self.batch_factor}")


class Phase(NamedTuple):
    """What one epoch is.

    Attributes:
        kind: ``warmup``, ``sft`` or ``dpo``.
        round: 0 in the warm-up, then from 1.
        epoch: Epoch within the phase, from 0.
    """

    kind: str
    round: int
    epoch: int


def plan_phases(rounds: int, epochs: Mapping[str, int]) -> list[Phase]:
    """List what each epoch of a run is.

    Args:
        rounds: Rounds of self-play.
        epochs: Epochs of ``warmup``, ``sft`` and ``dpo``.
    """
    order = [("warmup", 0)] + [(kind, number) for number in range(1, rounds + 1) for kind in ("sft", "dpo")]
    return [Phase(kind, number, epoch) for kind, number in order for epoch in range(epochs[kind])]


@dataclass
class SelfPlayState:
    """All that a resumed run needs, as plain data.

    Attributes:
        epoch: The epoch whose rows are shown; -1 before the first.
        path: File of the running round, relative to the run's folder.
        digest: Checksum of that file.
        history: For each finished phase its name and the figures logged by then; those of validation only if it was validated at its end.
        before: Test figures and recommendation counts of the model after its warm-up, and what they depend on.
        figures: Last value of what was logged in the running phase.
        validated: The last epoch at whose end the model was validated; -1 before the first.
        marks: For each phase the optimizer step at which it began, and ``supervised`` or ``preference``.
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
        """Add the figures of a phase to the history.

        Args:
            phase: The phase.
            epoch: Its last epoch. Figures of an earlier validation are not those of the phase's end, and are left out.
        """
        figures = {name: value for name, value in self.figures.items() if self.validated == epoch or not name.startswith("val_")}
        self.history.append({"phase": phase.kind, "round": phase.round, **figures})


def reset_moments(optimizer: Any) -> None:
    """Forget an optimizer's moments in place, so that it goes on like a new one; works on what DeepSpeed wraps, too."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
