"""What an edited model says: of the facts themselves, in other words, and of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from malleable.datamodules.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import take_answers
from malleable.lightning_modules.editing.prompts import Reader

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
