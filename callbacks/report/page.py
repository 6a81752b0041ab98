"""Sections of a report, protocols of the objects that contribute them, and conversion to Markdown."""

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
    """Section of a report.

    Attributes:
        title: Heading.
        text: Markdown.
        table: Header and rows. Markdown in cells is escaped.
        figure: Function that draws on a figure, e.g. ``lambda figure: draw_curves(figure.subplots(), curves)``.
        figure_size: Width and height of the figure in inches.
    """

    title: str
    text: str = ""
    table: tuple[Sequence[str], Rows] | None = None
    figure: Callable[[Figure], None] | None = None
    figure_size: tuple[float, float] = (8.0, 4.5)


@dataclass(frozen=True)
class Column:
    """Metrics of another model, for comparison with the tested model.

    Attributes:
        title: Heading in tables.
        key: Prefix in ``metrics.json``, e.g. ``baseline_popularity`` for ``baseline_popularity_hr_10``.
        values: Metrics, by name without the prefix ``test_``.
    """

    title: str
    key: str
    values: Mapping[str, float]


@runtime_checkable
class HasSections(Protocol):
    """Protocol for callbacks that contribute sections to the report. The method is called on rank zero after fit and after test."""

    def report_sections(self) -> list[Section]:
        """Return the sections of the current run."""


@runtime_checkable
class HasHeadlineMetrics(Protocol):
    """Protocol for modules and callbacks with main test metrics. The property is read on rank zero after fit and after test."""

    @property
    def headline_metrics(self) -> Sequence[str]:
        """Names of the main metrics without the prefix ``test_``, e.g. ``hr_10``."""


@runtime_checkable
class HasColumns(Protocol):
    """Protocol for callbacks that evaluate other models. The method is called on rank zero after fit and after test."""

    def report_columns(self) -> list[Column]:
        """Return the metrics of the other models in the last test."""


@runtime_checkable
class HasRows(Protocol):
    """Protocol for callbacks that store metrics of single test rows or requests. The method is called on rank zero after test."""

    def report_rows(self) -> Mapping[str, Sequence[float]]:
        """Return the values of each row, by metric without the prefix ``test_``; ``nan`` for rows without a value."""


@runtime_checkable
class HasPhases(Protocol):
    """Protocol for callbacks that train in phases with different losses. The method is called on rank zero after fit and after test."""

    def report_phases(self) -> list[tuple[int, str]]:
        """Return the first optimizer step of each phase, in ascending order, and the kind of the phase."""


def format_cell(value: Any) -> str:
    """Format a cell of a table: four decimals, or two for large values, or three significant digits; a dash for missing values."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """Format a Markdown table. The first column and columns of text are left-aligned, columns of numbers right-aligned."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    text = [index == 0 or (len(column) > 0 and all(isinstance(cell, str) for cell in column)) for index, column in enumerate(columns)]
    lines = [_table_line(header), "|" + "|".join(" --- " if left else " ---: " for left in text) + "|"]
    return "\n".join([*lines, *(_table_line([format_cell(cell) for cell in row]) for row in rows)])


def plain_table(header: Sequence[str], rows: Rows) -> str:
    """Format a table for a terminal."""
    cells = [[for_terminal(cell) for cell in row] for row in (header, *([format_cell(cell) for cell in row] for row in rows))]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def figure_names(sections: Sequence[Section]) -> list[str]:
    """Return the file name of the figure of each section, derived from its title and numbered if titles are equal."""
    names: list[str] = []
    for section in sections:
        stem = re.sub(r"[^a-z0-9]+", "_", section.title.lower()).strip("_") or "figure"
        same = sum(re.fullmatch(rf"{stem}(_\d+)?\.png", name) is not None for name in names)
        names.append(f"{stem}_{same + 1}.png" if same else f"{stem}.png")
    return names


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Format the sections as a Markdown page that refers to figures by :func:`figure_names`."""
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


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(for_markdown(str(cell)) for cell in cells) + " |"
