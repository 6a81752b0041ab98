"""What a report is made of, and how it becomes Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from malleable.datamodules.files.escape import for_markdown, for_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A part of a report that a callback contributes.

    Attributes:
        title: Heading.
        text: Markdown.
        table: Header and rows; cells are shown as they are, Markdown in them is not interpreted.
        figure: Draws on a figure, e.g. ``lambda figure: draw_curves(figure.subplots(), curves)``.
        figure_size: Width and height of the figure in inches.
    """

    title: str
    text: str = ""
    table: tuple[Sequence[str], Rows] | None = None
    figure: Callable[[Figure], None] | None = None
    figure_size: tuple[float, float] = (8.0, 4.5)


@dataclass(frozen=True)
class Column:
    """Figures of another model, to stand beside the tested one.

    Attributes:
        title: Heading in tables.
        key: Prefix in ``metrics.json``: ``baseline_popularity`` gives ``baseline_popularity_hr_10``.
        values: Values by metric, without the split's name.
    """

    title: str
    key: str
    values: Mapping[str, float]


@runtime_checkable
class HasSections(Protocol):
    """A callback with something to say in the report; asked on rank zero after fit and after test."""

    def report_sections(self) -> list[Section]:
        """Return the sections known by now."""


@runtime_checkable
class HasHeadlineMetrics(Protocol):
    """A module or callback that names its main test metrics; read on rank zero after fit and after test."""

    @property
    def headline_metrics(self) -> Sequence[str]:
        """Names without the split's name, such as ``hr_10``."""


@runtime_checkable
class HasColumns(Protocol):
    """A callback that measured other models; asked on rank zero after fit and after test."""

    def report_columns(self) -> list[Column]:
        """Return the columns known by now."""


@runtime_checkable
class HasRows(Protocol):
    """A callback that measured single rows of a test (or requests); asked on rank zero after test."""

    def report_rows(self) -> Mapping[str, Sequence[float]]:
        """Return the values of the tested module for each row by metric, without the split's name; ``nan`` where a row has none."""


@runtime_checkable
class HasPhases(Protocol):
    """A callback that trains in phases with losses of their own; asked on rank zero after fit and after test."""

    def report_phases(self) -> list[tuple[int, str]]:
        """Return the optimizer step at which each phase begins, ascending, and the name of its kind."""


def number(value: Any) -> str:
    """Format a cell: four digits behind the point, fewer for large values; a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """Write a table; columns of numbers are aligned to the right, the first one and those of text to the left."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    text = [place == 0 or (len(column) > 0 and all(isinstance(cell, str) for cell in column)) for place, column in enumerate(columns)]
    lines = [_line(header), "|" + "|".join(" --- " if left else " ---: " for left in text) + "|"]
    return "\n".join([*lines, *(_line([number(cell) for cell in row]) for row in rows)])


def plain_table(header: Sequence[str], rows: Rows) -> str:
    """Write a table for a terminal."""
    cells = [[for_terminal(cell) for cell in row] for row in (header, *([number(cell) for cell in row] for row in rows))]
    widths = [max(len(row[place]) for row in cells) for place in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def figure_names(sections: Sequence[Section]) -> list[str]:
    """Name each section's figure after its title, equal titles by number."""
    names: list[str] = []
    for section in sections:
        stem = re.sub(r"[^a-z0-9]+", "_", section.title.lower()).strip("_") or "figure"
        same = sum(re.fullmatch(rf"{stem}(_\d+)?\.png", name) is not None for name in names)
        names.append(f"{stem}_{same + 1}.png" if same else f"{stem}.png")
    return names


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Write a page of sections; figures lie beside it, under :func:`figure_names`."""
    parts = [f"# {for_markdown(title)}"]
    for section, figure_name in zip(sections, figure_names(sections), strict=True):
        parts.append(f"## {for_markdown(section.title)}")
        if section.text:
            parts.append(section.text)
        if section.figure is not None:
            parts.append(f"![{for_markdown(section.title)}]({figure_name})")
        if section.table is not None:
            parts.append(markdown_table(*section.table))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(for_markdown(str(cell)) for cell in cells) + " |"
