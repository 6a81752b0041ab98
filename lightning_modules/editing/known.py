"""Selection of known facts: edit requests whose true answer a model gives before the edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import evaluate_answers
from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.functional.number_checks import check_numbers


@dataclass
class KnownFacts:
    """Selection of known facts, which a model answers correctly before the edit.

    Attributes:
        min_neighbors: Minimum number of neighbours that the model answers correctly; other neighbours are dropped.
        limit: Maximum number of requests; the first ones are kept.
    """

    min_neighbors: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "known.", at_least={"min_neighbors": 0, "limit": 1})


def known_requests(model: Any, tokenizer: Any, requests: Sequence[EditRequest], settings: KnownFacts) -> list[EditRequest]:
    """Select the requests whose true answer the model gives exactly, and, of each request, the neighbours that the model answers exactly.

    In a distributed run every rank must call this function.

    Args:
        model: Hugging Face decoder before the edit. Its mode, gradient flags and hooks are restored afterwards.
        tokenizer: Its fast tokenizer.
        requests: Edit requests; those without a true answer are dropped.
        settings: Settings of the selection.

    Raises:
        ValueError: If no request is left.
    """
    encoder = PromptEncoder(tokenizer)
    candidates = [request for request in requests if request.true is not None]
    with evaluation_mode(model):
        exact = _exact(model, encoder, [(request.prompt.replace(PLACEHOLDER, request.subject), str(request.true)) for request in candidates])
        known = [request for request, right in zip(candidates, exact, strict=True) if right]
        probes = list(dict.fromkeys(probe for request in known for probe in request.neighbors))
        exact = _exact(model, encoder, [(probe.prompt, probe.answer) for probe in probes])
    known_probes = {probe for probe, right in zip(probes, exact, strict=True) if right}
    chosen = []
    for request in known:
        neighbors = tuple(probe for probe in request.neighbors if probe in known_probes)
        if len(neighbors) >= settings.min_neighbors:
            chosen.append(replace(request, neighbors=neighbors))
    if not known:
        raise ValueError(
            f"the model gives the true answer of none of the {len(requests)} requests ({len(candidates)} have a true answer), so there is "
            "no known fact to edit; give other facts"
        )
    if not chosen:
        raise ValueError(
            f"the model gives the true answer of {len(known)} of {len(requests)} requests, but it answers at least {settings.min_neighbors} "
            "neighbours correctly for none of these; lower known.min_neighbors, or give other facts"
        )
    return chosen[: settings.limit]


def _exact(model: Any, encoder: PromptEncoder, questions: Sequence[tuple[str, str]]) -> list[bool]:
    """Return for each prompt and answer whether the model gives the answer exactly."""
    return evaluate_answers(model, encoder, questions).exact.tolist() if questions else []
