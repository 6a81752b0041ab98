"""What an edited model says: of the facts themselves, in other words, and of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.datamodules.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.prompts import Reader, Row
from malleable.lightning_modules.editing.targets import at_positions

SHARES = ("efficacy", "generalization", "specificity")


class Answers(NamedTuple):
    """How a model takes given answers to given questions.

    Attributes:
        nll: ``(N,)`` negative log-likelihood of a token of the answer, nats, mean over its tokens.
        accuracy: ``(N,)`` share of its tokens that are the likeliest, given the ones before.
    """

    nll: Tensor
    accuracy: Tensor

    @property
    def exact(self) -> Tensor:
        """Whether all tokens are, ``(N,)``."""
        return self.accuracy == 1


@torch.no_grad()
def take_answers(model: Any, reader: Reader, questions: Sequence[tuple[str, str]], max_rows: int = 64) -> Answers:
    """Score answers under teacher forcing.

    Args:
        model: In evaluation mode.
        reader: Makes rows of texts.
        questions: Texts and answers; a blank is put between them.
        max_rows: Rows of a pass.
    """
    device = next(model.parameters()).device
    answers = [reader.answer(answer) for _, answer in questions]
    rows = [reader.question(text, answer[:-1]) for (text, _), answer in zip(questions, answers, strict=True)]
    # Rows of like lengths share a pass.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    nll, accuracy = torch.zeros(len(rows)), torch.zeros(len(rows))
    for start in range(0, len(rows), max_rows):
        chosen = order[start : start + max_rows]
        nll[chosen], accuracy[chosen] = _scored(model, reader, [rows[number] for number in chosen], [answers[number] for number in chosen], device)
    return Answers(nll, accuracy)


def _scored(model: Any, reader: Reader, rows: Sequence[Row], answers: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    batch = reader.batch(rows, device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    row = torch.arange(len(rows), device=device).repeat_interleave(lengths)
    first = torch.tensor([len(one.ids) - len(answer) for one, answer in zip(rows, answers, strict=True)], device=device)
    within = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
    token = torch.tensor([token for answer in answers for token in answer], device=device)
    with at_positions(model, row, first[row] + within):
        logps = model(**batch.inputs(), use_cache=False).logits[0].float().log_softmax(-1)
    own = logps[torch.arange(len(token), device=device), token]
    right = (logps.argmax(-1) == token).float()
    sums = torch.zeros(2, len(rows), device=device).index_add_(1, row, torch.stack([-own, right])) / lengths
    return sums[0].cpu(), sums[1].cpu()


class RequestFigures(NamedTuple):
    """What came of a request: shares between 0 and 1, ``nan`` where nothing was asked.

    Attributes:
        efficacy: Whether the new answer is likelier than the old one (likeliest of all, where the old one is not known).
        generalization: The same, mean over its paraphrases.
        specificity: Share of the neighbours' questions whose own answer is likelier than the new one.
        efficacy_exact: Whether every token of the new answer is the likeliest.
        generalization_exact: The same, mean over its paraphrases.
        specificity_exact: Share of the neighbours' questions of whose own answer every token is the likeliest.
    """

    efficacy: float
    generalization: float
    specificity: float
    efficacy_exact: float
    generalization_exact: float
    specificity_exact: float


def measure(model: Any, reader: Reader, requests: Sequence[EditRequest], max_rows: int = 64) -> list[RequestFigures]:
    """Ask a model all that requests ask for.

    Args:
        model: In evaluation mode.
        reader: Makes rows of texts.
        requests: With paraphrases and neighbours as far as they have any.
        max_rows: Rows of a pass.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.3 (CounterFact); the exact shares as in
        its authors' code.
        Differs: without an old answer, efficacy and generalization are the exact ones.
    """
    questions: list[tuple[str, str]] = []
    for request in requests:
        texts = [request.prompt.replace(PLACEHOLDER, request.subject), *request.paraphrases]
        questions += [(text, request.target) for text in texts]
        questions += [(text, request.true) for text in texts if request.true is not None]
        questions += [(probe.prompt, probe.answer) for probe in request.neighbors]
        questions += [(probe.prompt, request.target) for probe in request.neighbors]
    answers = take_answers(model, reader, questions, max_rows)
    figures, start = [], 0
    for request in requests:
        asked, beside = 1 + len(request.paraphrases), len(request.neighbors)
        sizes = [asked, asked if request.true is not None else 0, beside, beside]
        nll, exact = (torch.split(values[start : start + sum(sizes)], sizes) for values in (answers.nll, answers.exact.float()))
        better = (nll[1] > nll[0]).float() if request.true is not None else exact[0]
        kept = (nll[2] < nll[3]).float()
        shares = (better[:1], better[1:], kept, exact[0][:1], exact[0][1:], exact[2])
        figures.append(RequestFigures(*(float(share.mean()) for share in shares)))
        start += sum(sizes)
    return figures


def summary(figures: Iterable[RequestFigures]) -> dict[str, float]:
    """Means over the requests that have the figure, in percent, and ``score``: the harmonic mean of the first three."""
    rows = list(figures)
    means = {}
    for name in RequestFigures._fields:
        values = [value for row in rows if not math.isnan(value := getattr(row, name))]
        if values:
            means[name] = 100 * sum(values) / len(values)
    if means.keys() >= set(SHARES):
        means["score"] = 3 / sum(1 / max(means[name], 1e-9) for name in SHARES)
    return means


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int = 512) -> float:
    """Perplexity of texts, a token's mean over all of them; each is read from its beginning.

    Raises:
        ValueError: If no text has two tokens.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]], device=device)
        if ids.shape[1] < 2:
            continue
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(logps.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    if not count:
        raise ValueError("perplexity needs texts of at least two tokens")
    return math.exp(total / count)
