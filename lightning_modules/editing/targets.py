"""Target vectors: the residual stream at a fact token for which the model gives the new answer, one vector for each fact, by gradient descent.

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
from malleable.lightning_modules.editing.prompts import PromptEncoder, Row, fill_prompt
from malleable.lightning_modules.editing.suffix_forward import FullForward, SuffixForward, choose_forward
from malleable.lightning_modules.functional.number_checks import check_numbers

BETAS, EPS = (0.9, 0.999), 1e-8
MAX_ROWS, MAX_ROWS_ON_CPU = 256, 64


class Fact(NamedTuple):
    """Fact that an edit writes into the weights.

    Attributes:
        prompt: Text with one ``{}`` for the subject.
        subject: Subject of the fact.
        target: New answer.
    """

    prompt: str
    subject: str
    target: str

    @classmethod
    def from_request(cls, request: EditRequest) -> Fact:
        """Return the fact of an edit request."""
        return cls(request.prompt, request.subject, request.target)


@dataclass
class TargetSettings:
    """Optimisation of target vectors.

    Attributes:
        lr: Learning rate of Adam.
        steps: Maximum number of forward passes; the number of optimizer steps is smaller by one.
        decay: Weight of the relative norm of the change.
        kl: Weight of the KL divergence from the original distribution of the token after the subject.
        clamp: Maximum norm of the change, relative to the norm of the residual stream.
        stop: Loss below which the optimisation of a fact ends.
        max_rows: Maximum number of rows of a forward pass; more facts are processed in several groups. Default: 256, or 64 on a CPU, because of the
            size of its caches.

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
        check_numbers(self, "targets.", above={"lr": 0, "clamp": 0, "stop": 0}, at_least={"steps": 1, "max_rows": 1, "decay": 0, "kl": 0})


class Targets(NamedTuple):
    """Target vectors of facts.

    Attributes:
        start: ``(F, v)`` residual stream after the prompt without a context.
        change: ``(F, v)`` change of the residual stream.
        loss: ``(F,)`` loss of the last pass.
        nll: ``(F,)`` negative log-likelihood of the answer in that pass, in nats, mean over tokens and contexts.
        steps: ``(F,)`` number of optimizer steps.
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
    model: Any, layout: Layout, layer: int, encoder: PromptEncoder, facts: Sequence[Fact], contexts: Sequence[str], settings: TargetSettings
) -> Targets:
    """Optimise the target vectors of facts at the output of a block, many at a time. The result is the same as one at a time.

    For a change ``x`` of the residual stream ``h`` at the fact token, the objective is the sum of three terms: the mean negative log-likelihood of
    the answer over contexts; ``kl KL(changed | original)`` of the token that follows the fact token in "{subject} is a"; and ``decay |x| / |h|^2``.
    Activations that do not depend on the change are computed once, see
    :class:`~malleable.lightning_modules.editing.suffix_forward.SuffixForward`. Logits are computed at the required tokens only.

    Args:
        model: Decoder in evaluation mode; its parameters are not changed.
        layout: Names of its modules.
        layer: Block whose output is changed.
        encoder: Encodes prompts.
        facts: Facts.
        contexts: Contexts of the prompts; the first one should be the empty context, ``{}``.
        settings: Settings of the optimisation.

    Raises:
        ValueError: If the loss of a fact is not finite.
    """
    device = next(model.parameters()).device
    rows = settings.max_rows or (MAX_ROWS_ON_CPU if device.type == "cpu" else MAX_ROWS)
    size = max(1, rows // len(contexts))
    # Facts with suffixes of similar length share a pass, which saves padding.
    order = sorted(range(len(facts)), key=lambda number: _suffix_length(encoder, facts[number]))
    found = []
    for start in range(0, len(order), size):
        chosen = [facts[number] for number in order[start : start + size]]
        found.append(_TargetOptimizer(model, layout, layer, encoder, chosen, contexts, settings).run())
    place = torch.tensor(order, device=device).argsort()
    return Targets(*(torch.cat(parts)[place] for parts in zip(*found, strict=True)))


def _suffix_length(encoder: PromptEncoder, fact: Fact) -> int:
    """Return the number of tokens of prompt and answer from the fact token on."""
    row = encoder.encode_prompt(fact.prompt, fact.subject, answer=encoder.encode_answer(fact.target)[:-1])
    return len(row.ids) - row.position


class _TargetOptimizer:
    """Optimiser of the targets of facts that fit in one forward pass."""

    def __init__(
        self, model: Any, layout: Layout, layer: int, encoder: PromptEncoder, facts: Sequence[Fact], contexts: Sequence[str], settings: TargetSettings
    ) -> None:
        self.settings, self.facts = settings, facts
        self.num_contexts = len(contexts)
        rows: list[Row] = []
        subject_rows: list[Row] = []
        # Of each answer token: its row, the position that predicts it relative to the fact token, and its id.
        answer_tokens: list[tuple[int, int, int]] = []
        for fact in facts:
            answer = encoder.encode_answer(fact.target)
            for context in contexts:
                row = encoder.encode_prompt(fact.prompt, fact.subject, context, answer[:-1])
                first = len(row.ids) - len(answer) - row.position
                answer_tokens += [(len(rows), first + place, token) for place, token in enumerate(answer)]
                rows.append(row)
            row = encoder.encode_prompt(f"{PLACEHOLDER} is a", fact.subject)
            # The row ends at the fact token, because the KL divergence is computed there.
            subject_rows.append(Row(row.ids[: row.position + 1], row.position))
        device = next(model.parameters()).device
        # Two passes: in one pass, the short rows of subjects would be padded to the length of the others.
        self.answers, self.subjects = (choose_forward(model, layout, layer, encoder.collate(part, device)) for part in (rows, subject_rows))
        self.answer_tokens = torch.tensor(answer_tokens, device=device)

    def run(self) -> Targets:
        """Run the optimisation until it has ended for every fact."""
        settings, number = self.settings, len(self.facts)
        answers, subjects = self.answers, self.subjects
        start = answers.start.view(number, self.num_contexts, -1)[:, 0].float()
        length = start.norm(dim=1)
        change, first, second = (torch.zeros_like(start) for _ in range(3))
        loss, nll = (start.new_zeros(number) for _ in range(2))
        steps = torch.zeros(number, dtype=torch.long, device=start.device)
        running, answer_tokens = torch.arange(number, device=start.device), self.answer_tokens
        original: Tensor | None = None
        for step in range(1, settings.steps + 1):
            leaf = change[running].requires_grad_()
            with torch.enable_grad():
                negative, changed = self._answer_nll(answers, leaf, answer_tokens), _subject_logps(subjects, leaf)
                original = changed.detach() if original is None else original
                divergence = F.kl_div(original[running], changed, log_target=True, reduction="none").sum(1)
                losses = negative + settings.kl * divergence + settings.decay * leaf.norm(dim=1) / length[running].square()
                self._check_finite(losses, running)
                loss[running], nll[running] = losses.detach(), negative.detach()
                unfinished = losses.detach() >= settings.stop
                if step == settings.steps or not unfinished.any():
                    break
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            if not unfinished.all():
                running, gradient = running[unfinished], gradient[unfinished]
                answers, subjects, answer_tokens = self._select(running)
            steps[running] = step
            first[running] = torch.lerp(gradient, first[running], BETAS[0])
            second[running] = torch.lerp(gradient.square(), second[running], BETAS[1])
            corrected = second[running] / (1 - BETAS[1] ** step)
            moved = change[running] - settings.lr * first[running] / (1 - BETAS[0] ** step) / (corrected.sqrt() + EPS)
            limit = settings.clamp * length[running]
            change[running] = moved * (limit / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
        return Targets(start, change, loss, nll, steps)

    def _select(self, running: Tensor) -> tuple[SuffixForward | FullForward, SuffixForward | FullForward, Tensor]:
        """Return passes of answers, passes of subjects, and answer tokens ``(n, 3)``, of the facts at the positions ``running``."""
        rows = (running[:, None] * self.num_contexts + torch.arange(self.num_contexts, device=running.device)).flatten()
        order = torch.full((len(self.facts) * self.num_contexts,), -1, device=running.device)
        order[rows] = torch.arange(len(rows), device=running.device)
        row, token, target = self.answer_tokens.T
        kept = order[row] >= 0
        return self.answers.select(rows), self.subjects.select(running), torch.stack([order[row], token, target], 1)[kept]

    def _answer_nll(self, answers: SuffixForward | FullForward, change: Tensor, answer_tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of the answer of each fact, ``(F,)``."""
        row, token, target = answer_tokens.T
        logps = answers.logits(change.repeat_interleave(self.num_contexts, 0), row, token).float().log_softmax(-1)
        own = logps[torch.arange(len(row), device=row.device), target]
        fact = row // self.num_contexts
        # Mean over tokens and contexts at once: the answer has the same number of tokens in every context.
        counts = torch.bincount(fact, minlength=len(change))
        return -torch.zeros_like(change[:, 0]).index_add(0, fact, own) / counts

    def _check_finite(self, losses: Tensor, running: Tensor) -> None:
        bad = running[~losses.detach().isfinite()].tolist()
        if bad:
            fact = self.facts[bad[0]]
            raise ValueError(
                f"the optimisation of the targets of {len(bad)} facts diverged (loss not finite), e.g. "
                f"{fill_prompt(fact.prompt, fact.subject)[0]!r} -> {fact.target!r}; lower targets.lr or load the model in float32"
            )


def _subject_logps(subjects: SuffixForward | FullForward, change: Tensor) -> Tensor:
    """Return the log-probabilities of the token after the subject of each fact, ``(F, V)``."""
    row = torch.arange(len(change), device=change.device)
    return subjects.logits(change, row, torch.zeros_like(row)).float().log_softmax(-1)
