"""Evaluation of a model on edit requests, and of earlier edits after later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import (
    evaluate_generated_answers,
    evaluate_generated_texts,
    evaluate_requests,
    generate_answers,
    perplexity,
)
from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.metrics.editing import EditingMetrics, EditSurvival, RequestFigures

Generated = Literal["off", "facts", "all"]


@dataclass
class Protocol:
    """Settings of the evaluation.

    Attributes:
        texts: Number of texts for perplexity; 0 disables it.
        writing: Length in tokens of the texts generated for fluency and consistency, if requests have ``generation_prompts``; 0 disables
            them.
        survival: Measure all facts edited so far after each batch.
        answers: Number of requests whose answers are generated, before and after the edit. ``generated`` refers to these requests.
        generated: Prompts after which answers are generated and compared with the expected answer (``efficacy_generated``; teacher forcing does not
            measure this): edited prompts only (``facts``), also paraphrases and neighbours (``all``, doubles the time), or none (``off``).
        generated_tokens: Maximum length of a generated answer in tokens; it ends earlier at the end-of-sequence token or a line break.
        max_rows: Rows of a forward pass.
        seed: Seed of the text generation for fluency and consistency.
    """

    texts: int = 100
    writing: int = 100
    survival: bool = True
    answers: int = 1000
    generated: Generated = "facts"
    generated_tokens: int = 20
    max_rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "protocol.", at_least={"texts": 0, "writing": 0, "answers": 0, "generated_tokens": 1, "max_rows": 1})
        if self.generated not in get_args(Generated):
            raise ValueError(f"protocol.generated must be one of {', '.join(get_args(Generated))}, got {self.generated!r}")


@dataclass(frozen=True)
class EvaluationResult:
    """Results of one evaluation.

    Attributes:
        requests: Metrics of each request.
        answers: Generated answers to the first requests.
        figures: Means over the requests, and metrics of texts, by name.
    """

    requests: list[RequestFigures] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate_edits(model: Any, tokenizer: Any, requests: Sequence[EditRequest], texts: Sequence[str], protocol: Protocol) -> EvaluationResult:
    """Evaluate a model on edit requests. The mode, gradient flags and hooks of the model are restored afterwards.

    In a distributed run every rank must call this function: the work is divided among the ranks, and all of them return all results.

    Args:
        model: Hugging Face decoder.
        tokenizer: Its fast tokenizer.
        requests: Edit requests.
        texts: Texts for perplexity.
        protocol: Settings of the evaluation.
    """
    encoder = PromptEncoder(tokenizer)
    with evaluation_mode(model):
        rows = evaluate_requests(model, encoder, requests, protocol.max_rows)
        rows, answers = _add_generated_answers(model, encoder, requests, rows, protocol)
        # Every rank has the metrics of all requests; synchronisation would count them again.
        metric = EditingMetrics(sync_on_compute=False)
        metric.update(rows)
        figures = {name: float(value) for name, value in metric.compute().items()}
        if texts and protocol.texts:
            figures["perplexity"] = perplexity(model, encoder, texts[: protocol.texts])
        if protocol.writing:
            figures |= evaluate_generated_texts(model, tokenizer, requests, protocol.writing, protocol.seed, protocol.max_rows)
    return EvaluationResult(rows, answers, figures)


def _add_generated_answers(
    model: Any, encoder: PromptEncoder, requests: Sequence[EditRequest], rows: Sequence[RequestFigures], protocol: Protocol
) -> tuple[list[RequestFigures], list[str]]:
    """Return the metrics with those of generated answers added, and the answers to the first requests."""
    chosen = requests[: protocol.answers]
    if protocol.generated == "off":
        prompts = [request.prompt.replace(PLACEHOLDER, request.subject) for request in chosen]
        lengths = [max(len(encoder.encode_answer(answer)) for answer in (request.target, request.true) if answer is not None) for request in chosen]
        return list(rows), generate_answers(model, encoder, prompts, lengths, protocol.max_rows)
    shares, answers = evaluate_generated_answers(model, encoder, chosen, protocol.generated_tokens, protocol.generated == "all", protocol.max_rows)
    extended = [
        row._replace(efficacy_generated=efficacy, generalization_generated=generalization, specificity_generated=specificity)
        for row, (efficacy, generalization, specificity) in zip(rows, shares, strict=False)
    ]
    return [*extended, *rows[len(extended) :]], answers


class SurvivalEvaluation:
    """Efficacy of all facts edited so far, after each batch of an edit.

    Args:
        batch_size: Requests of a batch.
        max_rows: Rows of a forward pass.
    """

    def __init__(self, batch_size: int, max_rows: int = 64) -> None:
        self.batch_size, self.max_rows = batch_size, max_rows
        self._efficacy: list[Tensor] = []

    def update(self, model: Any, tokenizer: Any, edited: Sequence[EditRequest]) -> None:
        """Measure a model after a batch. In a distributed run every rank must call this method.

        Args:
            model: Hugging Face decoder.
            tokenizer: Its fast tokenizer.
            edited: Requests edited so far, in order.
        """
        bare = [replace(request, paraphrases=(), neighbors=()) for request in edited]
        with evaluation_mode(model):
            rows = evaluate_requests(model, PromptEncoder(tokenizer), bare, self.max_rows)
        self._efficacy.append(torch.tensor([row.efficacy for row in rows]))

    def compute(self) -> dict[str, Any]:
        """Return the results as plain data.

        Returns:
            ``edits``: number of facts edited so far after each batch; ``matrix`` and ``curve`` of
            :class:`~malleable.lightning_modules.metrics.editing.EditSurvival`.
        """
        survival = EditSurvival(len(self._efficacy), sync_on_compute=False)
        for number, efficacy in enumerate(self._efficacy):
            survival.update(number, torch.arange(len(efficacy)) // self.batch_size, efficacy)
        found = survival.compute()
        edits = [len(efficacy) for efficacy in self._efficacy]
        return {"edits": edits, "matrix": found["matrix"].tolist(), "curve": found["curve"].tolist()}
