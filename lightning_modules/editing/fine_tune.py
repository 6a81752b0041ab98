"""Fine-tuning of the matrices that an edit changes, a baseline for edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.editing.answers import score_answers
from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.functional.number_checks import check_numbers


@dataclass
class FineTuneSettings:
    """Settings of fine-tuning.

    Attributes:
        lr: Learning rate of AdamW.
        steps: Maximum number of optimizer steps for a batch.
        stop: Mean loss below which the fine-tuning of a batch ends.
        decay: Weight decay.
    """

    lr: float = 5e-4
    steps: int = 25
    stop: float = 1e-2
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "tuning.", above={"lr": 0}, at_least={"steps": 1, "stop": 0, "decay": 0})


def fine_tune(
    model: Any, weights: Sequence[nn.Parameter], encoder: PromptEncoder, facts: Sequence[Fact], settings: FineTuneSettings, max_rows: int = 256
) -> tuple[list[float], int]:
    """Minimise the negative log-likelihood of answers after their prompts.

    Args:
        model: Model in evaluation mode.
        weights: Parameters to train; other parameters do not change.
        encoder: Encodes prompts.
        facts: Facts to train on.
        settings: Settings of the optimisation.
        max_rows: Rows of a forward pass; gradients are accumulated over all rows.

    Returns:
        Loss of each fact in the last pass, in nats per token, and the number of optimizer steps.
    """
    answers = [encoder.encode_answer(fact.target) for fact in facts]
    rows = [encoder.encode_prompt(fact.prompt, fact.subject, answer=answer[:-1]) for fact, answer in zip(facts, answers, strict=True)]
    # Small steps would be lost by rounding in half precision, so float32 master weights are trained.
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
                    nll = score_answers(model, encoder, rows[start : start + max_rows], answers[start : start + max_rows]).nll
                    own = torch.autograd.grad(nll.sum() / len(rows), list(weights))
                parts.append(nll.detach())
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
    """Update the master weights, and copy them to the weights of the model."""
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient.float()
    optimizer.step()
    for master, weight in zip(masters, weights, strict=True):
        weight.copy_(master)
