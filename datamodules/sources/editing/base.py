"""What a source of edit requests gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from malleable.datamodules.editing.requests import EditRequest


@dataclass(frozen=True)
class EditTables:
    """Requests, and text around them.

    Attributes:
        requests: What is to be edited.
        told: Sentences that tell the facts as they are, the edited ones among them: what a model can learn them from.
        kept: Those of them that tell facts which no request changes.
    """

    requests: list[EditRequest]
    told: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class EditSource(ABC):
    """Where edit requests come from; subclasses state origin and terms in their docstring."""

    @abstractmethod
    def load(self) -> EditTables:
        """Read or make the requests."""
