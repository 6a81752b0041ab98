"""What the residual stream must be at a subject for the model to give a new answer: one vector for each fact, found by gradient descent.

Shapes: F facts, C contexts of a fact, B rows of a pass, T tokens, v width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.prompts import Reader, Row, fill
from malleable.lightning_modules.editing.tails import Tails, WholeRows, follow

BETAS, EPS = (0.9, 0.999), 1e-8
ROWS, ROWS_ON_CPU = 256, 64


class Fact(NamedTuple):
    """What is to hold after an edit.

    Attributes:
        prompt: Holds ``{}`` for the subject.
        subject: What the fact is about.
        target: The new answer.
    """

    prompt: str
    subject: str
    target: str

    @classmethod
    def of(cls, request: EditRequest) -> Fact:
        """What a request asks for."""
        return cls(request.prompt, request.subject, request.target)


@dataclass
class TargetSettings:
    """How target vectors are sought.

    Attributes:
        lr: Rate of Adam.
        steps: Most passes; one fewer step is made.
        decay: Weight of the vector's relative length.
        kl: Weight of the divergence from what the model said of the subject before.
        clamp: Longest change, as a share of the residual stream's length.
        stop: Loss at which a fact is done.
        max_rows: Rows of a pass; facts beyond wait for the next. Default: 64 on a CPU, whose caches hold no more, else 256.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, and Meng et al. (2023), MEMIT, arXiv:2210.07229: the authors' code.
    """

    lr: float = 0.5
    steps: int = 25
    decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 0.75
    stop: float = 0.05
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("lr", "clamp", "stop"):
            if getattr(self, name) <= 0:
                raise ValueError(f"targets.{name} must be > 0, got {getattr(self, name)}")
        for name in ("steps", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"targets.{name} must be >= 1, got {value}")


class Targets(NamedTuple):
    """Where facts should bring the residual stream.

    Attributes:
        start: ``(F, v)`` where it is, at the bare prompt.
        change: ``(F, v)`` what is to be added.
        loss: ``(F,)`` of the last pass.
        nll: ``(F,)`` negative log-likelihood of a token of the answer in it, nats, mean over tokens and contexts.
        steps: ``(F,)`` steps made.
    """

    start: Tensor
    change: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor

    @property
    def value(self) -> Tensor:
        """Target vectors, ``(F, v)``."""
        return self.start + self.change


def find_targets(
    model: Any, layout: Layout, layer: int, reader: Reader, facts: Sequence[Fact], contexts: Sequence[str], settings: TargetSettings
) -> Targets:
    """Seek the target vectors of facts at the output of a block, many at a time; each as if it were alone.

    Minimised are, for a change ``x`` at the subject: the answer's negative log-likelihood after all contexts, ``kl KL(now | before)`` of the next
    token after "{subject} is a", and ``decay |x| / |h|^2``. What does not depend on the change is computed once (see
    :class:`~malleable.lightning_modules.editing.tails.Tails`), logits where they are needed.

    Args:
        model: A decoder in evaluation mode; its parameters are left alone.
        layout: Names of its parts.
        layer: The block whose output is changed.
        reader: Makes rows of texts.
        facts: What is to hold.
        contexts: Where prompts are read; the first should be the bare one.
        settings: See there.

    Raises:
        ValueError: If the loss of a fact is not finite.
    """
    device = next(model.parameters()).device
    rows = settings.max_rows or (ROWS_ON_CPU if device.type == "cpu" else ROWS)
    size = max(1, rows // len(contexts))
    # Facts with equally much behind the subject share a pass: the others would be filled up.
    order = sorted(range(len(facts)), key=lambda number: _behind(reader, facts[number]))
    found = []
    for start in range(0, len(order), size):
        search = _Search(model, layout, layer, reader, [facts[number] for number in order[start : start + size]], contexts, settings)
        found.append(search.run())
    place = torch.tensor(order, device=device).argsort()
    return Targets(*(torch.cat(parts)[place] for parts in zip(*found, strict=True)))


def _behind(reader: Reader, fact: Fact) -> int:
    """Tokens of the prompt and the answer behind the look-up token."""
    row = reader.row(fact.prompt, fact.subject, answer=reader.answer(fact.target)[:-1])
    return len(row.ids) - row.position


class _Search:
    """The targets of facts that fit in one pass."""

    def __init__(
        self, model: Any, layout: Layout, layer: int, reader: Reader, facts: Sequence[Fact], contexts: Sequence[str], settings: TargetSettings
    ) -> None:
        self.settings, self.facts = settings, facts
        self.num_rows = len(contexts)
        rows: list[Row] = []
        about: list[Row] = []
        spots: list[tuple[int, int, int]] = []  # row, token behind the look-up token, the answer's next one
        for fact in facts:
            answer = reader.answer(fact.target)
            for context in contexts:
                row = reader.row(fact.prompt, fact.subject, context, answer[:-1])
                first = len(row.ids) - len(answer) - row.position
                spots += [(len(rows), first + place, token) for place, token in enumerate(answer)]
                rows.append(row)
            row = reader.row(f"{PLACEHOLDER} is a", fact.subject)
            # The look-up token: what the model says of the subject itself.
            about.append(Row(row.ids[: row.position + 1], row.position))
        device = next(model.parameters()).device
        # Apart: among rows with something behind the look-up token they would be filled up.
        self.tails, self.about = (follow(model, layout, layer, reader.batch(part, device)) for part in (rows, about))
        self.spots = torch.tensor(spots, device=device)

    def run(self) -> Targets:
        """Descend until every fact is done."""
        settings, number = self.settings, len(self.facts)
        tails, about = self.tails, self.about
        start = tails.start.view(number, self.num_rows, -1)[:, 0].float()
        length = start.norm(dim=1)
        change, first, second = (torch.zeros_like(start) for _ in range(3))
        loss, nll = (start.new_zeros(number) for _ in range(2))
        steps = torch.zeros(number, dtype=torch.long, device=start.device)
        running, spots = torch.arange(number, device=start.device), self.spots
        before: Tensor | None = None
        for step in range(1, settings.steps + 1):
            leaf = change[running].requires_grad_()
            with torch.enable_grad():
                negative, said = self._unlikely(tails, leaf, spots), _said(about, leaf)
                before = said.detach() if before is None else before
                divergence = F.kl_div(before[running], said, log_target=True, reduction="none").sum(1)
                losses = negative + settings.kl * divergence + settings.decay * leaf.norm(dim=1) / length[running].square()
                self._check(losses, running)
                loss[running], nll[running] = losses.detach(), negative.detach()
                going = losses.detach() >= settings.stop
                if step == settings.steps or not going.any():
                    break
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            if not going.all():
                running, gradient = running[going], gradient[going]
                tails, about, spots = self._only(running)
            steps[running] = step
            first[running] = torch.lerp(gradient, first[running], BETAS[0])
            second[running] = torch.lerp(gradient.square(), second[running], BETAS[1])
            corrected = second[running] / (1 - BETAS[1] ** step)
            moved = change[running] - settings.lr * first[running] / (1 - BETAS[0] ** step) / (corrected.sqrt() + EPS)
            limit = settings.clamp * length[running]
            change[running] = moved * (limit / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
        return Targets(start, change, loss, nll, steps)

    def _only(self, running: Tensor) -> tuple[Tails | WholeRows, Tails | WholeRows, Tensor]:
        """The rows and spots of some facts."""
        rows = (running[:, None] * self.num_rows + torch.arange(self.num_rows, device=running.device)).flatten()
        order = torch.full((len(self.facts) * self.num_rows,), -1, device=running.device)
        order[rows] = torch.arange(len(rows), device=running.device)
        row, token, target = self.spots.T
        kept = order[row] >= 0
        return self.tails.take(rows), self.about.take(running), torch.stack([order[row], token, target], 1)[kept]

    def _unlikely(self, tails: Tails | WholeRows, change: Tensor, spots: Tensor) -> Tensor:
        """Negative log-likelihood of each running fact ``(F,)``."""
        row, token, target = spots.T
        logps = tails.logits(change.repeat_interleave(self.num_rows, 0), row, token).float().log_softmax(-1)
        own = logps[torch.arange(len(row), device=row.device), target]
        fact = row // self.num_rows
        # Mean over an answer's tokens and over contexts: every context has equally many tokens.
        counts = torch.bincount(fact, minlength=len(change))
        return -torch.zeros_like(change[:, 0]).index_add(0, fact, own) / counts

    def _check(self, losses: Tensor, running: Tensor) -> None:
        bad = running[~losses.detach().isfinite()].tolist()
        if bad:
            fact = self.facts[bad[0]]
            raise ValueError(
                f"the target of {len(bad)} facts was lost (loss not finite), the first {fill(fact.prompt, fact.subject)[0]!r} -> {fact.target!r}; "
                "lower targets.lr or load the model in float32"
            )


def _said(about: Tails | WholeRows, change: Tensor) -> Tensor:
    """What is said of each running fact's subject, log-probabilities ``(F, V)``."""
    row = torch.arange(len(change), device=change.device)
    return about.logits(change, row, torch.zeros_like(row)).float().log_softmax(-1)
