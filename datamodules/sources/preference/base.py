"""Base class of sources of preference data, and the rows that they return.

For a new source, implement :meth:`PreferenceSource.files` and :meth:`PreferenceSource.load` in a new file of this folder, and add the class to
``datamodules/__init__.pyi``. ``synthetic.py`` is an example. :class:`~malleable.datamodules.sources.preference.records.RecordReader` converts records
with the usual fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Message(NamedTuple):
    """Turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Prompt: a plain text, or the turns of a conversation before the answer."""


class PreferenceRow(NamedTuple):
    """Prompt with its answers.

    Attributes:
        prompt: Plain text, or turns of a conversation. All rows of a source have the same kind of prompt.
        answers: Chosen answer, then at least one rejected answer. An unpaired row has one answer.
        place: File and line, for messages.
        desirable: Whether the only answer of an unpaired row is desirable; ``None`` for rows with rejected answers.
        smoothing: Probability that the preference is reversed; ``None`` if unknown.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    place: str
    desirable: bool | None = None
    smoothing: float | None = None


@dataclass(frozen=True)
class PreferenceTables:
    """Rows of a source by split.

    Attributes:
        rows: Rows by split: ``train``, and ``val`` and ``test`` if the source has them.
        dropped: Number of rows that were dropped during reading, by reason.
    """

    rows: dict[str, list[PreferenceRow]]
    dropped: Mapping[str, int] = field(default_factory=dict)


class PreferenceSource(ABC):
    """Base class of sources of preference data. The docstring of a subclass states the origin and the licence of its data."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files of the source, and download them if needed; their content identifies the data."""

    @abstractmethod
    def load(self) -> PreferenceTables:
        """Read or generate the rows."""

    def settings(self) -> dict[str, object]:
        """Return the settings that affect the data, besides the files. Default: the attributes without a leading underscore."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
