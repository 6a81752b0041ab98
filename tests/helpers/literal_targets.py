"""Literal implementation of target vectors: one fact at a time, full forward passes, logits at all tokens, ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.editing.targets import Fact, TargetSettings


class LiteralTarget(NamedTuple):
    """Original residual stream, its change, the loss of the last pass, and the number of optimizer steps."""

    start: Tensor
    change: Tensor
    loss: float
    steps: int


def literal_target(
    model: Any, block: nn.Module, encoder: PromptEncoder, fact: Fact, contexts: Sequence[str], settings: TargetSettings
) -> LiteralTarget:
    """Optimise the target vector of a fact at the output of a block."""
    answer = encoder.encode_answer(fact.target)
    rows = [encoder.encode_prompt(fact.prompt, fact.subject, context, answer[:-1]) for context in contexts] + [
        encoder.encode_prompt("{} is a", fact.subject)
    ]
    batch = encoder.collate(rows)
    labels = torch.full_like(batch.input_ids, -100)
    for number, row in enumerate(rows[:-1]):
        labels[number, len(row.ids) - len(answer) : len(row.ids)] = torch.tensor(answer)
    place = torch.arange(len(rows)), batch.position
    start: Tensor | None = None
    before: Tensor | None = None
    change: Tensor | None = None

    def inject(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal start, change
        states = output[0] if isinstance(output, tuple) else output
        if start is None:
            start = states[0, batch.position[0]].detach().clone()
            change = torch.zeros_like(start).requires_grad_()
        assert change is not None
        changed = states.clone()
        changed[place] += change
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    optimizer: torch.optim.Optimizer | None = None
    handle = block.register_forward_hook(inject)
    try:
        for step in range(settings.steps):
            logits = model(**batch.inputs(), use_cache=False).logits
            assert start is not None
            assert change is not None
            optimizer = optimizer or torch.optim.Adam([change], lr=settings.lr)
            nll = F.cross_entropy(logits[:-1].flatten(0, 1), labels[:-1].flatten())
            now = logits[-1, batch.position[-1]].log_softmax(-1)
            before = now.detach() if before is None else before
            divergence = (now.exp() * (now - before)).sum()
            loss = nll + settings.kl * divergence + settings.decay * change.norm() / start.norm() ** 2
            if loss < settings.stop or step == settings.steps - 1:
                return LiteralTarget(start, change.detach(), float(loss.detach()), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                change *= min(1.0, float(settings.clamp * start.norm() / change.norm()))
    finally:
        handle.remove()
    raise AssertionError("settings.steps is at least 1")
