"""Metrics of edits: efficacy, generalization, specificity, perplexity, fluency, consistency and survival."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.lightning_modules.functional.editing.word_statistics import Tfidf, fluency

SHARES = ("efficacy", "generalization", "specificity")


class RequestFigures(NamedTuple):
    """Measurements of an edit request, between 0 and 1; ``nan`` if the request has no prompts for a measurement.

    "Most probable" refers to the tokens of the vocabulary, under teacher forcing.

    Attributes:
        efficacy: Whether the new answer is more probable than the old one; if the old one is unknown, ``efficacy_exact``.
        generalization: Mean of efficacy over the paraphrases.
        specificity: Share of the neighbour prompts whose original answer is more probable than the new one.
        efficacy_exact: Whether every token of the new answer is most probable.
        generalization_exact: Mean of efficacy_exact over the paraphrases.
        specificity_exact: Share of the neighbour prompts for which every token of the original answer is most probable.
        efficacy_accuracy: Share of the tokens of the new answer that are most probable.
        generalization_accuracy: Mean of efficacy_accuracy over the paraphrases.
        specificity_accuracy: Mean over the neighbour prompts of the share of the tokens of the original answer that are most probable.
        efficacy_generated: Whether the text generated after the prompt contains the new answer.
        generalization_generated: Mean of efficacy_generated over the paraphrases.
        specificity_generated: Share of the neighbour prompts for which the generated text contains the original answer.
    """

    efficacy: float
    generalization: float
    specificity: float
    efficacy_exact: float
    generalization_exact: float
    specificity_exact: float
    efficacy_accuracy: float
    generalization_accuracy: float
    specificity_accuracy: float
    efficacy_generated: float = math.nan
    generalization_generated: float = math.nan
    specificity_generated: float = math.nan


class _Sums(Metric):
    """Sums and counts of values, summed over processes; values ``nan`` are left out."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(width, dtype=torch.double), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        """Add values ``(N, width)``."""
        values = values.to(self.total)
        present = ~values.isnan()
        # Not in place: a state that was reset in inference mode cannot be modified outside it.
        self.total = self.total + values.nan_to_num().sum(0)
        self.count = self.count + present.sum(0)


class EditingMetrics(_Sums):
    """Means of :class:`RequestFigures` over the requests that have each figure, in percent.

    ``score`` is the harmonic mean of efficacy, generalization and specificity, if all three exist.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.3. Published figures on zsRE correspond to
        ``*_accuracy``. ``*_generated``: Yang et al. (2025), The Mirage of Model Editing, arXiv:2502.11177, who generate until a stop token.
        Differs: answers are matched by :func:`~malleable.lightning_modules.functional.editing.answer_match.contains_answer`, not by a language model.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(len(RequestFigures._fields), **options)

    def update(self, figures: Sequence[RequestFigures]) -> None:
        """Add the figures of requests; each request must be added once."""
        if figures:
            self._add(torch.tensor(figures, dtype=torch.double))

    def compute(self) -> dict[str, Tensor]:
        """Return the means; figures that no request has are left out."""
        rows = zip(RequestFigures._fields, self.total, self.count, strict=True)
        means = {name: 100 * total / count for name, total, count in rows if count > 0}
        if means.keys() >= set(SHARES):
            means["score"] = 3 / sum(1 / means[name].clamp_min(1e-9) for name in SHARES)
        return means


class Perplexity(_Sums):
    """Perplexity: the exponential of the mean negative log-likelihood of a token."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, **options)

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a mean negative log-likelihood, in nats, over ``weight`` tokens. If a likelihood is nan, the perplexity is nan."""
        weight = weight.to(self.total)
        self.total = self.total - loss.detach().to(self.total) * weight
        self.count = self.count + weight

    def compute(self) -> dict[str, Tensor]:
        """Return the perplexity."""
        return {"perplexity": (-self.total / self.count).exp().squeeze()}


class Fluency(_Sums):
    """Mean n-gram entropy of generated texts, in hundredths of a bit; small for repetitive texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, **options)

    def update(self, texts: Sequence[str]) -> None:
        """Add texts."""
        if texts:
            self._add(torch.tensor([[100 * fluency(text)] for text in texts]))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean."""
        return {"fluency": (self.total / self.count).squeeze()}


class Consistency(_Sums):
    """Mean cosine similarity, in percent, of texts generated about a subject and reference texts.

    The reference texts are about other subjects for which the new answer is true.

    Args:
        tfidf: TF-IDF weights, computed from all reference texts.
        **options: Arguments of :class:`torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    def __init__(self, tfidf: Tfidf, **options: Any) -> None:
        super().__init__(1, **options)
        self.tfidf = tfidf

    def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
        """Add a subject: its generated texts and its reference texts."""
        self._add(torch.tensor([[100 * self.tfidf.cosine(" ".join(texts), " ".join(references))]]))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean."""
        return {"consistency": (self.total / self.count).squeeze()}


class EditSurvival(_Sums):
    """Share of edits that are still effective after later edits.

    Args:
        num_batches: B, number of batches of edits.
        **options: Arguments of :class:`torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    def __init__(self, num_batches: int, **options: Any) -> None:
        super().__init__(num_batches * num_batches, **options)
        self.num_batches = num_batches

    def update(self, after: int, batch: Tensor, effective: Tensor) -> None:
        """Add measurements of facts after batch ``after``.

        Args:
            after: Index of the batch of edits after which the facts were measured.
            batch: ``(N,)`` index of the batch that edited each fact.
            effective: ``(N,)`` whether, or to which degree between 0 and 1, each edit is effective.
        """
        place = torch.as_tensor(batch, device=self.total.device).long() + after * self.num_batches
        effective = torch.as_tensor(effective).to(self.total)
        self.total = self.total.index_add(0, place, effective)
        self.count = self.count.index_add(0, place, torch.ones_like(effective))

    def compute(self) -> dict[str, Tensor]:
        """Return the shares in percent.

        Returns:
            ``matrix`` ``(B, B)``: in row i and column j, the share of the facts of batch j that are effective after batch i, ``nan`` without
            measurements; ``curve`` ``(B,)``: share of all facts edited so far that are effective after each batch.
        """
        total, count = self.total.view(self.num_batches, -1), self.count.view(self.num_batches, -1)
        return {"matrix": 100 * total / count, "curve": 100 * total.sum(1) / count.sum(1)}
