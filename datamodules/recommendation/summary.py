"""Summary of data: counts after filtering, cleaning and splitting, and warnings about properties that make figures unreliable."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.global_batches import world

log = logging.getLogger(__name__)

Floats = NDArray[np.floating[Any]]

# Lower bound of times since 1970 in each unit, for dates from 1973 on. Smaller numbers are not dates.
UNITS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
UNSPLIT = re.compile(r"[,;]|^\[")  # genres that look like lists that were not split
UNSPLIT_SHARE = 0.05  # number of genres that match `UNSPLIT`, relative to the items with genres, above which there is a warning
WARNING = "warning"
SHOWN = 40  # maximum number of characters of a title in a message


@dataclass
class DataSummary:
    """Properties of prepared data as short texts.

    Attributes:
        facts: Text of each property by name, in the order of printing.
        warnings: Problems of the source or of the settings.
        filters: For each filter that removed interactions: its name, and the numbers of remaining interactions and users.
    """

    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    filters: list[tuple[str, int, int]] = field(default_factory=list)

    def pairs(self) -> list[tuple[str, str]]:
        """Return name and text of each property, then the warnings."""
        return [*self.facts.items(), *((WARNING, text) for text in self.warnings)]

    def count(self, name: str, users: Sequence[Any] | NDArray[Any]) -> None:
        """Add the numbers of interactions and users after a filter, unless it removed nothing.

        Args:
            name: Name of the filter.
            users: User of each remaining interaction.
        """
        number = len(users)
        if not self.filters or number != self.filters[-1][1]:
            self.filters.append((name, number, int(pd.Series(users).nunique())))
            self.facts["interactions (users)"] = " → ".join(f"{count:,} ({people:,}) {name}" for name, count, people in self.filters)

    def describe_items(self, given: Sequence[str], cleaned: Sequence[str], keys: Sequence[Sequence[str]], titles: Sequence[str]) -> None:
        """Add the numbers of items, of changed titles and of merged titles.

        Args:
            given: Title of each item of the source.
            cleaned: Cleaned title of each item; empty if no readable text remains.
            keys: Ids in the source of each distinct title.
            titles: Distinct titles.
        """
        parts = [f"{len(given):,} read, {len(titles):,} distinct titles"]
        if merged := [(title, own) for title, own in zip(titles, keys, strict=True) if len(own) > 1]:
            title, own = merged[0]
            parts.append(f"{sum(len(ids) - 1 for _, ids in merged):,} merged by title (e.g. ids {', '.join(own[:3])}: {brief_repr(title, SHOWN)})")
        if changed := [(old, new) for old, new in zip(given, cleaned, strict=True) if new not in ("", old)]:
            old, new = changed[0]
            parts.append(f"{len(changed):,} titles cleaned (e.g. {brief_repr(old, SHOWN)} → {brief_repr(new, SHOWN)})")
        if untitled := list(cleaned).count(""):
            parts.append(f"{untitled:,} without a readable title dropped")
        self.facts["items"] = "; ".join(parts)

    def describe_genres(self, genres: Sequence[Sequence[str]]) -> None:
        """Add the number of genres, and a warning if genres look like lists that were not split."""
        having = [own for own in genres if own]
        if not having:
            return
        counts = Counter(genre for own in having for genre in own)
        self.facts["genres"] = f"{len(counts):,} of {len(having):,} items, most frequent: {'; '.join(name for name, _ in counts.most_common(3))}"
        unsplit = [genre for own in having for genre in own if UNSPLIT.search(genre)]
        if len(unsplit) >= UNSPLIT_SHARE * len(having):
            self.warnings.append(
                f"{len(unsplit):,} genres look like lists that were not split, e.g. {brief_repr(unsplit[0], 60)}: set genre_delimiter of Tables, "
                "write `Drama|Comedy`, or use a list in JSON lines or Parquet; MGU and DGU count each such text as one genre"
            )

    def describe_times(self, times: Floats) -> None:
        """Add the range of times and their unit, and warnings about several units and about infinite times.

        Args:
            times: ``(E,)`` time of each remaining interaction.
        """
        finite = times[np.isfinite(times)]
        if len(finite) < len(times):
            self.warnings.append(f"{len(times) - len(finite):,} timestamps are infinite; they are ordered first or last")
        if not len(finite):
            return
        low, high = float(finite.min()), float(finite.max())
        units = {name: int(count) for name, count in zip(("none", *UNITS), _unit_counts(finite), strict=True) if count}
        if len(units) > 1:
            counts = ", ".join(f"{count:,} {_describe_unit(name)}" for name, count in units.items())
            self.warnings.append(f"timestamps look like several units: {counts}; they are ordered as plain numbers. Convert them to one unit")
        (unit, *others) = units
        if others or unit == "none":
            self.facts["time"] = f"{low:g} to {high:g}{'' if others else ' (no dates)'}"
        else:
            scale = UNITS[unit] / UNITS["seconds"]
            self.facts["time"] = f"{_date(low / scale)} to {_date(high / scale)} ({unit})"

    def describe_ties(self, tied: Mapping[str, float]) -> None:
        """Add the share of validation and test targets that have the same time as the item before them.

        Args:
            tied: Share by split.
        """
        if any(tied.values()):
            shares = ", ".join(f"{share:.1%} of {split}" for split, share in tied.items())
            self.facts["tied times"] = f"{shares} targets have the same time as the item before; the order of rows in the file is used"
        elif tied:
            self.facts["tied times"] = "none at the split"

    def count_short(self, lengths: Sequence[int]) -> None:
        """Add the number of histories with a single item, which have no row, if there are any."""
        if single := sum(length < 2 for length in lengths):
            self.facts["short"] = f"{single:,} of {len(lengths):,} users have a single item and therefore no row"

    def describe_rows(self, rows: Mapping[str, tuple[int, int]]) -> None:
        """Add the numbers of rows; ``rows`` contains for each split a pair: the number of used rows, and the number of all rows."""
        texts = [f"{split} {used:,}" + (f" of {every:,}" if used < every else "") for split, (used, every) in rows.items()]
        self.facts["rows"] = ", ".join(texts)


def log_summary(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Log a summary on the first rank.

    Args:
        title: Title of the summary.
        pairs: Name and text of each property; pairs with the name ``warning`` are logged as warnings.
    """
    if world()[0] != 0:
        return
    width = max((len(name) for name, _ in pairs if name != WARNING), default=0)
    log.info("%s:\n%s", title, "\n".join(f"  {name:<{width}}  {text}" for name, text in pairs if name != WARNING))
    for text in (text for name, text in pairs if name == WARNING):
        log.warning("%s", text)


def tied_share(times: Floats, starts: NDArray[np.integer[Any]], sequence: NDArray[np.integer[Any]], end: NDArray[np.integer[Any]]) -> float:
    """Return the share of rows whose target has the same time as the item before it.

    Args:
        times: ``(E,)`` times of all sequences, concatenated.
        starts: ``(S,)`` position in ``times`` of the first item of each sequence.
        sequence: ``(N,)`` sequence of each row.
        end: ``(N,)`` position of each target within its sequence, at least 1.
    """
    place = starts[sequence] + end
    return float((times[place] == times[place - 1]).mean()) if len(place) else 0.0


def _unit_counts(times: Floats) -> NDArray[np.integer[Any]]:
    return np.bincount(np.searchsorted(list(UNITS.values()), np.abs(times), side="right"), minlength=len(UNITS) + 1)


def _describe_unit(unit: str) -> str:
    return "below 1973 in any unit" if unit == "none" else f"in {unit}"


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s"
