"""What a model says of the facts that are edited: asked before and after, and after every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.editor import AlphaEditor, Edited
from malleable.lightning_modules.editing.prompts import Reader
from malleable.lightning_modules.editing.protocol import measure, measure_generated, measure_writing, perplexity, say
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.editing.undisturbed import undisturbed
from malleable.lightning_modules.metrics.editing import EditingMetrics, EditSurvival, RequestFigures

Generated = Literal["off", "facts", "all"]


@dataclass
class Protocol:
    """What is measured besides the facts, their paraphrases and neighbours.

    Attributes:
        texts: Texts of which perplexity is measured; 0 measures none.
        writing: Tokens of the texts written for fluency and consistency, where requests have beginnings; 0 writes none.
        survival: Ask for all facts edited so far after each batch.
        answers: Requests whose answers are written out, before and after; also those that ``generated`` measures.
        generated: Let the model answer freely and see whether it gives the new answer (``efficacy_generated``), which teacher forcing cannot tell:
            after the ``facts`` only, after ``all`` questions, which takes as long as all other questions together, or not (``off``).
        generated_tokens: Most tokens of such an answer; it ends earlier at the tokenizer's end token or a line break.
        max_rows: Rows of a pass.
        seed: Of the writing.
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
class Findings:
    """What a model says.

    Attributes:
        requests: Figures of each request.
        answers: What it answers to the first requests.
        figures: Means, and figures of texts.
    """

    requests: list[RequestFigures] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def examine(model: Any, tokenizer: Any, requests: Sequence[EditRequest], texts: Sequence[str], protocol: Protocol) -> Findings:
    """Ask a model all that the protocol asks; it is left as it was.

    In a run of several ranks all of them must call it: they share the questions and texts, and all return all findings.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        requests: What is asked for.
        texts: Texts whose perplexity is measured.
        protocol: What else.
    """
    reader = Reader(tokenizer)
    with undisturbed(model):
        rows = measure(model, reader, requests, protocol.max_rows)
        rows, answers = _answered(model, reader, requests, rows, protocol)
        # Every rank has the figures of all requests: nothing is to be added up.
        metric = EditingMetrics(sync_on_compute=False)
        metric.update(rows)
        figures = {name: float(value) for name, value in metric.compute().items()}
        if texts and protocol.texts:
            figures["perplexity"] = perplexity(model, reader, texts[: protocol.texts])
        if protocol.writing:
            figures |= measure_writing(model, tokenizer, requests, protocol.writing, protocol.seed, protocol.max_rows)
    return Findings(rows, answers, figures)


def _answered(
    model: Any, reader: Reader, requests: Sequence[EditRequest], rows: Sequence[RequestFigures], protocol: Protocol
) -> tuple[list[RequestFigures], list[str]]:
    """Figures with those of free answers, and the answers to the first requests."""
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
    """Edit, and ask after each batch which of the facts edited so far hold.

    Args:
        editor: The editor.
        requests: What is to hold.
        protocol: Whether to ask.

    Returns:
        What became of each request, and ``edits``, ``matrix`` and ``curve`` (see
        :class:`~malleable.lightning_modules.metrics.editing.EditSurvival`); without ``survival`` empty.
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
