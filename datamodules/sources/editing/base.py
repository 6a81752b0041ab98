"""Base class of sources of edit requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from malleable.datamodules.editing.requests import EditRequest


@dataclass(frozen=True)
class EditTables:
    """Edit requests, and statements of facts.

    Attributes:
        requests: Edit requests.
        statements: Sentences that state the facts before the edit, including the facts to edit; used as training texts.
        retained: Those statements whose facts no request changes.
    """

    requests: list[EditRequest]
    statements: list[str] = field(default_factory=list)
    retained: list[str] = field(default_factory=list)


class EditSource(ABC):
    """Base class of sources of edit requests. The docstring of a subclass states the origin and the licence of its data."""

    @abstractmethod
    def load(self) -> EditTables:
        """Read or build the requests."""
