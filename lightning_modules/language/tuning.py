"""The course of the optimizer that tunes a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

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
        """Make the optimizer; on CUDA in one kernel for all parameters."""
        fused = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused or None)

    def scheduler(self, optimizer: torch.optim.Optimizer, total: float) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of a run of ``total`` steps; where nothing bounds them (``math.inf``), the rate stays at its peak after the rise."""
        if math.isinf(total) and self.decay != "constant":
            rank_zero_warn(
                f"tuning.decay: {self.decay} needs a number of steps, but the run is unbounded: the learning rate stays at {self.lr} after the "
                "warm-up; give trainer.max_epochs or trainer.max_steps (max_time may end the run earlier), or set tuning.decay: constant"
            )
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_decay(step, total, self.warmup_steps, self.decay))
