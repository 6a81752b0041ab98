"""What edits did: to the facts themselves, in other words, to their neighbours, to the text, and after later edits."""

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
    """What came of a request: shares between 0 and 1, ``nan`` where nothing was asked.

    Attributes:
        efficacy: Whether the new answer is likelier than the old one (likeliest of all, where the old one is not known).
        generalization: The same, mean over its paraphrases.
        specificity: Share of the neighbours' questions whose own answer is likelier than the new one.
        efficacy_exact: Whether every token of the new answer is the likeliest.
        generalization_exact: The same, mean over its paraphrases.
        specificity_exact: Share of the neighbours' questions of whose own answer every token is the likeliest.
        efficacy_accuracy: Share of the new answer's tokens that are the likeliest.
        generalization_accuracy: The same, mean over its paraphrases.
        specificity_accuracy: The same of the neighbours' own answers, mean over them.
        efficacy_generated: Whether the text that is generated after the prompt gives the new answer, without teacher forcing.
        generalization_generated: The same, mean over its paraphrases.
        specificity_generated: Share of the neighbours' questions after which the generated text gives their own answer.
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
    """Sums of values that may be missing, over all devices."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(width, dtype=torch.double), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        """Add ``(N, width)``."""
        values = values.to(self.total)
        known = ~values.isnan()
        # Not in place: states reset in inference mode could not be changed outside it.
        self.total = self.total + values.nan_to_num().sum(0)
        self.count = self.count + known.sum(0)


class EditingMetrics(_Sums):
    """Means of :class:`RequestFigures` over the requests that have the figure, in percent.

    ``score`` is the harmonic mean of efficacy, generalization and specificity, where there are all three.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.3; published figures of zsRE are the
        shares of right tokens, ``*_accuracy``. ``*_generated``: Yang et al. (2025), The Mirage of Model Editing, arXiv:2502.11177, whose
        evaluation generates until a stop token; see :func:`~malleable.lightning_modules.functional.editing.answer_match.gives_answer` for the match.
        Differs: its authors let a language model judge the match.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(len(RequestFigures._fields), **options)

    def update(self, figures: Sequence[RequestFigures]) -> None:
        """Add the figures of requests, each request once."""
        if figures:
            self._add(torch.tensor(figures, dtype=torch.double))

    def compute(self) -> dict[str, Tensor]:
        """Return the means that there are."""
        rows = zip(RequestFigures._fields, self.total, self.count, strict=True)
        means = {name: 100 * total / count for name, total, count in rows if count > 0}
        if means.keys() >= set(SHARES):
            means["score"] = 3 / sum(1 / means[name].clamp_min(1e-9) for name in SHARES)
        return means


class Perplexity(_Sums):
    """Perplexity, a token's mean over all texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, **options)

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Add a mean negative log-likelihood, nats, over ``weight`` tokens. One that is not a number makes the perplexity none."""
        weight = weight.to(self.total)
        self.total = self.total - loss.detach().to(self.total) * weight
        self.count = self.count + weight

    def compute(self) -> dict[str, Tensor]:
        """Return the perplexity."""
        return {"perplexity": (-self.total / self.count).exp().squeeze()}


class Fluency(_Sums):
    """Mean entropy of what a model writes, hundredths of a bit: falls when it repeats itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, **options)

    def update(self, texts: Sequence[str]) -> None:
        """Add texts, each by itself."""
        if texts:
            self._add(torch.tensor([[100 * fluency(text)] for text in texts]))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean."""
        return {"fluency": (self.total / self.count).squeeze()}


class Consistency(_Sums):
    """Mean cosine, in percent, of what a model writes of a subject and texts of which its new answer is true.

    Args:
        tfidf: Weights of words, of all these texts.
        **options: Of :class:`torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    def __init__(self, tfidf: Tfidf, **options: Any) -> None:
        super().__init__(1, **options)
        self.tfidf = tfidf

    def update(self, written: Sequence[str], references: Sequence[str]) -> None:
        """Add a subject: what was written of it, and the texts it should resemble."""
        self._add(torch.tensor([[100 * self.tfidf.cosine(" ".join(written), " ".join(references))]]))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean."""
        return {"consistency": (self.total / self.count).squeeze()}


class EditSurvival(_Sums):
    """Which edits hold after later ones.

    Args:
        num_batches: Batches of edits, B.
        **options: Of :class:`torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    def __init__(self, num_batches: int, **options: Any) -> None:
        super().__init__(num_batches * num_batches, **options)
        self.num_batches = num_batches

    def update(self, after: int, batch: Tensor, held: Tensor) -> None:
        """Add how facts fare after batch ``after``.

        Args:
            after: The last batch made.
            batch: ``(N,)`` the batch that edited each fact.
            held: ``(N,)`` whether, or how far, each holds.
        """
        place = torch.as_tensor(batch, device=self.total.device).long() + after * self.num_batches
        held = torch.as_tensor(held).to(self.total)
        self.total = self.total.index_add(0, place, held)
        self.count = self.count.index_add(0, place, torch.ones_like(held))

    def compute(self) -> dict[str, Tensor]:
        """Return shares in percent.

        Returns:
            ``matrix`` ``(B, B)``: of the facts of a batch (column) after a batch (row), ``nan`` where none were asked; ``curve`` ``(B,)``: of
            all facts edited so far after each batch.
        """
        total, count = self.total.view(self.num_batches, -1), self.count.view(self.num_batches, -1)
        return {"matrix": 100 * total / count, "curve": 100 * total.sum(1) / count.sum(1)}
