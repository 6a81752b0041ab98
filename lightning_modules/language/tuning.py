"""Settings of the optimizer and scheduler of language models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.functional.schedule import warmup_decay


@dataclass
class Tuning:
    """Settings of the default optimizer and scheduler.

    Attributes:
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of matrices.
        warmup_steps: Number of optimizer steps of linear warm-up.
        decay: Schedule after the warm-up; ``linear`` and ``cosine`` decay to zero at the end of training.
    """

    lr: float = 3e-4
    weight_decay: float = 0.0
    warmup_steps: int = 20
    decay: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "tuning.", above={"lr": 0}, at_least={"weight_decay": 0, "warmup_steps": 0})

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer; on CUDA, its fused implementation."""
        fused = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused or None)

    def scheduler(self, optimizer: torch.optim.Optimizer, total: float) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the scheduler for a run of ``total`` steps; without a bound (``math.inf``), the rate is constant after the warm-up."""
        if math.isinf(total) and self.decay != "constant":
            rank_zero_warn(
                f"tuning.decay: {self.decay} needs a number of steps, but the run is unbounded: the learning rate is {self.lr} after the warm-up; "
                "set trainer.max_epochs or trainer.max_steps (max_time may end the run earlier), or tuning.decay: constant"
            )
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_decay(step, total, self.warmup_steps, self.decay))
