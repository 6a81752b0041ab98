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
        statements: Sentences that state the facts before the edit, those to be edited among them; training texts.
        retained: The statements of facts that no request changes.
    """

    requests: list[EditRequest]
    statements: list[str] = field(default_factory=list)
    retained: list[str] = field(default_factory=list)


class EditSource(ABC):
    """Where edit requests come from; subclasses state origin and terms in their docstring."""

    @abstractmethod
    def load(self) -> EditTables:
        """Read or make the requests."""
