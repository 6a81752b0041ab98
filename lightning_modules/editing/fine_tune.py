"""Plain descent on the matrices that edits change: what an edit must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.editing.answers import score_answers
from malleable.lightning_modules.editing.prompts import Reader
from malleable.lightning_modules.editing.targets import Fact


@dataclass
class FineTuneSettings:
    """How the matrices descend.

    Attributes:
        lr: Rate of Adam.
        steps: Most steps of a batch.
        stop: Mean loss at which a batch is done.
        decay: Weight decay.
    """

    lr: float = 5e-4
    steps: int = 25
    stop: float = 1e-2
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.lr <= 0 or self.steps < 1:
            raise ValueError(f"tuning.lr must be > 0 and tuning.steps >= 1, got {self.lr} and {self.steps}")


def fine_tune(
    model: Any, weights: Sequence[nn.Parameter], reader: Reader, facts: Sequence[Fact], settings: FineTuneSettings, max_rows: int = 256
) -> tuple[list[float], int]:
    """Minimise the negative log-likelihood of answers after their bare prompts.

    Args:
        model: In evaluation mode; all but ``weights`` stay.
        weights: What is trained.
        reader: Makes rows of texts.
        facts: What is to hold.
        settings: See there.
        max_rows: Rows of a pass; a step takes all of them.

    Returns:
        Loss of each fact, nats a token, before the last step, and the steps made.
    """
    answers = [reader.answer(fact.target) for fact in facts]
    rows = [reader.row(fact.prompt, fact.subject, answer=answer[:-1]) for fact, answer in zip(facts, answers, strict=True)]
    # Half-precision weights would not move: masters in single precision do.
    masters = [weight.detach().float().clone().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=settings.lr, weight_decay=settings.decay)
    losses = torch.zeros(len(facts))
    steps = 0
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for steps in range(settings.steps + 1):
            parts, gradients = [], [torch.zeros_like(master) for master in masters]
            for start in range(0, len(rows), max_rows):
                with torch.enable_grad():
                    each = score_answers(model, reader, rows[start : start + max_rows], answers[start : start + max_rows]).nll
                    own = torch.autograd.grad(each.sum() / len(rows), list(weights))
                parts.append(each.detach())
                gradients = [total + part.float() for total, part in zip(gradients, own, strict=True)]
            losses = torch.cat(parts)
            if losses.mean() < settings.stop or steps == settings.steps:
                break
            _step(masters, gradients, optimizer, weights)
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return losses.tolist(), steps


@torch.no_grad()
def _step(masters: Sequence[Tensor], gradients: Sequence[Tensor], optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> None:
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient.float()
    optimizer.step()
    for master, weight in zip(masters, weights, strict=True):
        weight.copy_(master)
