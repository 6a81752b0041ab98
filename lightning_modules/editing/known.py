"""Facts that a model has: no editor can be judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import take_answers
from malleable.lightning_modules.editing.prompts import Reader


@dataclass
class KnownFacts:
    """Which requests to make.

    Attributes:
        min_neighbors: Fewest neighbours whose own answers the model gives; the others are not asked.
        limit: Most requests, the first of those that are left.
    """

    min_neighbors: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.min_neighbors < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"known.min_neighbors must be >= 0 and known.limit >= 1, got {self.min_neighbors} and {self.limit}")


def known_requests(model: Any, reader: Reader, requests: Sequence[EditRequest], settings: KnownFacts) -> list[EditRequest]:
    """Leave out what a model does not know: requests whose old answer it does not give word for word, and such neighbours.

    Args:
        model: In evaluation mode, not edited.
        reader: Makes rows of texts.
        requests: Those without an old answer are left out.
        settings: See there.

    Raises:
        ValueError: If nothing is left.
    """
    asked = [request for request in requests if request.true is not None]
    questions = [(request.prompt.replace(PLACEHOLDER, request.subject), str(request.true)) for request in asked]
    exact = take_answers(model, reader, questions).exact.tolist() if questions else []
    known = [request for request, right in zip(asked, exact, strict=True) if right]
    probes = list(dict.fromkeys(probe for request in known for probe in request.neighbors))
    right = take_answers(model, reader, [(probe.prompt, probe.answer) for probe in probes]).exact.tolist() if probes else []
    kept = {probe for probe, own in zip(probes, right, strict=True) if own}
    chosen = []
    for request in known:
        neighbors = tuple(probe for probe in request.neighbors if probe in kept)
        if len(neighbors) >= settings.min_neighbors:
            chosen.append(replace(request, neighbors=neighbors))
    if not chosen:
        raise ValueError(
            f"the model gives the old answer of {len(known)} of {len(requests)} requests, and none of these has {settings.min_neighbors} neighbours "
            "that it knows: there is no known fact to edit; lower known.min_neighbors, or take other facts"
        )
    return chosen[: settings.limit]
