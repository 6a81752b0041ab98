"""The course of the optimizer that tunes a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from malleable.lightning_modules.functional.schedule import warmup_decay


@dataclass
class Tuning:
    """The optimizer's course, where no optimizer or scheduler is injected.

    Attributes:
        lr: Peak learning rate of AdamW.
        weight_decay: Decay of matrices.
        warmup_steps: Optimizer steps of linear rise.
        decay: Course after the rise, down to zero at the end of training.
    """

    lr: float = 3e-4
    weight_decay: float = 0.0
    warmup_steps: int = 20
    decay: Literal["linear", "cosine", "constant"] = "linear"

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of a run of ``total`` steps."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_decay(step, total, self.warmup_steps, self.decay))
