"""Evaluation of edits: before, after and between batches; selection of facts that a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import measure, measure_generated, measure_writing, perplexity, say, take_answers
from malleable.lightning_modules.editing.editor import AlphaEditor, Edited
from malleable.lightning_modules.editing.prompts import Reader
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.editing.undisturbed import undisturbed
from malleable.lightning_modules.metrics.editing import EditingMetrics, EditSurvival, RequestFigures

Generated = Literal["off", "facts", "all"]


@dataclass
class Protocol:
    """Settings of the evaluation.

    Attributes:
        texts: Number of texts for perplexity; 0 turns it off.
        writing: Length in tokens of the texts generated for fluency and consistency, where requests have ``generation_prompts``; 0 turns them off.
        survival: Measure all facts edited so far after each batch.
        answers: Number of requests whose answers are generated, before and after; ``generated`` measures these.
        generated: Prompts after which the model generates freely, and the text is compared with the answer (``efficacy_generated``; teacher forcing
            does not measure this): edited prompts only (``facts``), also paraphrases and neighbours (``all``, doubles the time), or none (``off``).
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
        for name, least in (("texts", 0), ("writing", 0), ("answers", 0), ("generated_tokens", 1), ("max_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"protocol.{name} must be >= {least}, got {getattr(self, name)}")
        if self.generated not in get_args(Generated):
            raise ValueError(f"protocol.generated must be one of {', '.join(get_args(Generated))}, got {self.generated!r}")


@dataclass(frozen=True)
class EvaluationResult:
    """Results of one evaluation.

    Attributes:
        requests: Metrics of each request.
        answers: Generated answers to the first requests.
        figures: Means over the requests, and metrics of texts.
    """

    requests: list[RequestFigures] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate_edits(model: Any, tokenizer: Any, requests: Sequence[EditRequest], texts: Sequence[str], protocol: Protocol) -> EvaluationResult:
    """Evaluate a model on edit requests. Its mode, flags and hooks are restored afterwards.

    In a distributed run every rank must call this function: the work is divided among the ranks, and all of them return all results.

    Args:
        model: Hugging Face decoder.
        tokenizer: Its fast tokenizer.
        requests: Edit requests.
        texts: Texts for perplexity.
        protocol: Settings of the evaluation.
    """
    reader = Reader(tokenizer)
    with undisturbed(model):
        rows = measure(model, reader, requests, protocol.max_rows)
        rows, answers = _answered(model, reader, requests, rows, protocol)
        # Every rank has the metrics of all requests; synchronisation would count them again.
        metric = EditingMetrics(sync_on_compute=False)
        metric.update(rows)
        figures = {name: float(value) for name, value in metric.compute().items()}
        if texts and protocol.texts:
            figures["perplexity"] = perplexity(model, reader, texts[: protocol.texts])
        if protocol.writing:
            figures |= measure_writing(model, tokenizer, requests, protocol.writing, protocol.seed, protocol.max_rows)
    return EvaluationResult(rows, answers, figures)


def _answered(
    model: Any, reader: Reader, requests: Sequence[EditRequest], rows: Sequence[RequestFigures], protocol: Protocol
) -> tuple[list[RequestFigures], list[str]]:
    """Return the metrics with those of generated answers added, and the answers to the first requests."""
    asked = requests[: protocol.answers]
    if protocol.generated == "off":
        prompts = [request.prompt.replace(PLACEHOLDER, request.subject) for request in asked]
        lengths = [max(len(reader.answer(answer)) for answer in (request.target, request.true) if answer is not None) for request in asked]
        return list(rows), say(model, reader, prompts, lengths, protocol.max_rows)
    shares, answers = measure_generated(model, reader, asked, protocol.generated_tokens, protocol.generated == "all", protocol.max_rows)
    free = [
        row._replace(efficacy_generated=efficacy, generalization_generated=generalization, specificity_generated=specificity)
        for row, (efficacy, generalization, specificity) in zip(rows, shares, strict=False)
    ]
    return [*free, *rows[len(free) :]], answers


def edit_in_batches(editor: AlphaEditor, requests: Sequence[EditRequest], protocol: Protocol) -> tuple[list[Edited], dict[str, Any]]:
    """Edit in batches, and measure the efficacy of all facts edited so far after each batch.

    Args:
        editor: Editor of the model.
        requests: Edit requests.
        protocol: Settings of the evaluation; ``survival`` turns the measurement between batches on.

    Returns:
        The edit result of each request, and ``edits``, ``matrix`` and ``curve`` (see
        :class:`~malleable.lightning_modules.metrics.editing.EditSurvival`); an empty dictionary without ``survival``.
    """
    size = editor.settings.batch_size
    facts = [Fact.of(request) for request in requests]
    if not protocol.survival:
        return editor.edit(facts), {}
    batch = torch.arange(len(facts)) // size
    survival = EditSurvival(int(batch[-1]) + 1, sync_on_compute=False)
    bare = [replace(request, paraphrases=(), neighbors=()) for request in requests]
    records: list[Edited] = []
    for number in range(survival.num_batches):
        records += editor.edit(facts[number * size : (number + 1) * size])
        done = len(records)
        with undisturbed(editor.model):
            rows = measure(editor.model, editor.reader, bare[:done], protocol.max_rows)
        survival.update(number, batch[:done], torch.tensor([row.efficacy for row in rows]))
    found = survival.compute()
    edits = [min((number + 1) * size, len(facts)) for number in range(survival.num_batches)]
    return records, {"edits": edits, "matrix": found["matrix"].tolist(), "curve": found["curve"].tolist()}


@dataclass
class KnownFacts:
    """Settings for the selection of facts that a model knows.

    Attributes:
        min_neighbors: Minimum number of neighbours that the model answers correctly; other neighbours are dropped.
        limit: Maximum number of requests; the first ones are kept.
    """

    min_neighbors: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.min_neighbors < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"known.min_neighbors must be >= 0 and known.limit >= 1, got {self.min_neighbors} and {self.limit}")


def known_requests(model: Any, reader: Reader, requests: Sequence[EditRequest], settings: KnownFacts) -> list[EditRequest]:
    """Select the requests whose true answer the model gives exactly, and of each request such neighbours.

    Args:
        model: Model in evaluation mode, before the edit.
        reader: Tokenizes prompts.
        requests: Edit requests; those without a true answer are dropped.
        settings: Settings of the selection.

    Raises:
        ValueError: If no request is left.
    """
    candidates = [request for request in requests if request.true is not None]
    questions = [(request.prompt.replace(PLACEHOLDER, request.subject), str(request.true)) for request in candidates]
    exact = take_answers(model, reader, questions).exact.tolist() if questions else []
    known = [request for request, right in zip(candidates, exact, strict=True) if right]
    probes = list(dict.fromkeys(probe for request in known for probe in request.neighbors))
    right = take_answers(model, reader, [(probe.prompt, probe.answer) for probe in probes]).exact.tolist() if probes else []
    known_probes = {probe for probe, own in zip(probes, right, strict=True) if own}
    chosen = []
    for request in known:
        neighbors = tuple(probe for probe in request.neighbors if probe in known_probes)
        if len(neighbors) >= settings.min_neighbors:
            chosen.append(replace(request, neighbors=neighbors))
    if not chosen:
        raise ValueError(
            f"the model gives the old answer of {len(known)} of {len(requests)} requests, and none of these has {settings.min_neighbors} neighbours "
            "that it knows: there is no known fact to edit; lower known.min_neighbors, or take other facts"
        )
    return chosen[: settings.limit]
