"""Command ``malleable compare``: test metrics of several runs side by side, with paired confidence intervals. Without torch."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from malleable.callbacks.report.metric_notes import is_total, with_arrow
from malleable.callbacks.report.page import format_cell, markdown_table, plain_table
from malleable.commands.reported_runs import Run, load_run, why_incomparable, why_unpaired
from malleable.datamodules.files.escape import for_csv, for_markdown, for_terminal
from malleable.lightning_modules.metrics.significance import paired_bootstrap, row_values
from malleable.recipes import similar

log = logging.getLogger(__name__)

Format = Literal["table", "markdown", "csv", "json"]

HELP = """usage: malleable compare [--all] [--format FORMAT] RUN RUN [RUN ...]

Show the test metrics of runs side by side, with differences to the first run. If the test rows are the same, differences have paired 95 % intervals.

  RUN              a run folder such as runs/sprec/tiny/version_0, or the name of a recipe such as sprec/tiny for its latest fit in `runs`
  --all            show all metrics and cut-offs
  --format FORMAT  table (default), markdown, csv or json
"""


class Difference(NamedTuple):
    """Difference of a metric between a run and the first run.

    Attributes:
        mean: Mean over the test rows.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the difference with its interval, and ``*`` if the interval excludes 0."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{' *' if self.low > 0 or self.high < 0 else '  '}"


class Row(NamedTuple):
    """Values of one metric for all runs.

    Attributes:
        metric: Name of the metric.
        values: Value for each run; ``None`` if a run does not have the metric, or if it cannot be compared with the value of the first run.
        differences: Difference of each further run to the first run; ``None`` if the rows are not paired or the metric is not a mean over rows.
        incomparable: Reason why the value of each further run cannot be compared with the value of the first run; empty if it can.
    """

    metric: str
    values: list[float | None]
    differences: list[Difference | None]
    incomparable: list[str]


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs.

    Attributes:
        runs: The runs. The others are compared with the first one.
        headings: Name of each run, with its model if the models differ.
        rows: Metrics.
        reasons: Reason why each further run cannot be paired with the first run; ``None`` if it can.
    """

    runs: Sequence[Run]
    headings: Sequence[str]
    rows: Sequence[Row]
    reasons: Sequence[str | None]

    def notes(self) -> list[str]:
        """Return notes on the choice of runs, on intervals and metrics without intervals, and on runs and metrics that are not compared."""
        notes = [run.note for run in self.runs if run.note]
        if any(reason is None for reason in self.reasons):
            notes.append("differences to the first run: paired bootstrap over the test rows, seed 0; *: the interval excludes 0")
            notes += self._notes_on_intervals()
        notes += [f"{heading}: {reason}" for heading, reason in zip(self.headings[1:], self.reasons, strict=True) if reason is not None]
        for number, heading in enumerate(self.headings[1:]):
            metrics: dict[str, list[str]] = {}
            for row in self.rows:
                metrics.setdefault(row.incomparable[number], []).append(row.metric)
            notes += [f"{heading}: {', '.join(names)} not comparable, {reason}" for reason, names in metrics.items() if reason]
        return notes

    def _notes_on_intervals(self) -> list[str]:
        """Return notes on the metrics of paired runs that have no interval."""
        paired = [number for number, reason in enumerate(self.reasons) if reason is None]
        without = [
            row.metric
            for row in self.rows
            if row.values[0] is not None and any(row.differences[number] is None and row.values[number + 1] is not None for number in paired)
        ]
        causes = {
            "computed from totals over all rows, not a mean over rows": [name for name in without if is_total(name)],
            "the values of single rows are not stored": [name for name in without if not is_total(name)],
        }
        return [f"no interval for {', '.join(names)}: {cause}" for cause, names in causes.items() if names]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of a table."""
        header = ["metric", self.headings[0]]
        for heading, reason in zip(self.headings[1:], self.reasons, strict=True):
            header += [heading, "difference (95 %)" if reason is None else "not paired"]
        rows = []
        for row in self.rows:
            cells = [with_arrow(row.metric), format_cell(row.values[0])]
            for value, difference, incomparable in zip(row.values[1:], row.differences, row.incomparable, strict=True):
                cells += ["not comparable" if incomparable else format_cell(value), "" if difference is None else str(difference)]
            rows.append(cells)
        return header, rows


def run_compare(argv: Sequence[str]) -> None:
    """Run ``malleable compare [--all] [--format FORMAT] RUN RUN...``.

    Args:
        argv: Runs and options. A run is a folder such as ``runs/sprec/tiny/version_0``, or the name of a recipe such as ``sprec/tiny`` for its latest
            fit in ``runs``. ``--all`` shows all metrics and cut-offs. ``--format`` is ``table``, ``markdown``, ``csv`` or ``json``.

    Raises:
        ValueError: If there are fewer than two runs, or an option or a format is unknown.
        FileNotFoundError: If a run or its report is missing.
    """
    if set(argv) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return
    names, every, style = _options(argv)
    if len(names) < 2:
        raise ValueError("malleable compare needs at least two runs, e.g. malleable compare runs/sprec/tiny/version_0 runs/sft/tiny/version_0")
    found = compare([load_run(name) for name in names], every)
    sys.stdout.write(render(found, style))
    if style in ("csv", "json"):
        # Log the notes, because other programs read the output.
        for note in found.notes():
            log.info("%s", note)


def _options(argv: Sequence[str]) -> tuple[list[str], bool, Format]:
    """Return the names of the runs, whether to show all metrics, and the format."""
    names: list[str] = []
    every, style = False, "table"
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        option, equals, value = argument.partition("=")
        if option == "--format":
            style = value if equals else remaining.pop(0) if remaining else ""
            if style not in get_args(Format):
                raise ValueError(f"--format {style}: the formats are {', '.join(get_args(Format))}{similar(style, get_args(Format))}")
        elif argument == "--all":
            every = True
        elif argument.startswith("-"):
            raise ValueError(
                f"malleable compare has no option {argument}{similar(argument, ('--all', '--format'))}; its options are --all and --format"
            )
        else:
            names.append(argument)
    return names, every, style  # type: ignore[return-value]


def compare(runs: Sequence[Run], every: bool = False) -> Comparison:
    """Compare runs.

    Args:
        runs: Runs. The others are compared with the first one.
        every: Include all metrics. By default, ``hits`` and metrics without a cut-off or with cut-off 10 are included.
    """
    first, *others = runs
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown = [name for name in names if every or _is_main(name)] or names
    reasons = [why_unpaired(first, other) for other in others]
    rows = [_row(name, first, others, reasons) for name in shown]
    several = len({run.model for run in runs}) > 1
    headings = [f"{run.model} {run.name}" if several and run.model else run.name for run in runs]
    return Comparison(runs, headings, rows, reasons)


def _row(name: str, first: Run, others: Sequence[Run], reasons: Sequence[str | None]) -> Row:
    incomparable = [why_incomparable(name, first, other) for other in others]
    values = [None if problem else other.metrics.get(name) for other, problem in zip(others, incomparable, strict=True)]
    differences = [difference(name, first, other) if reason is None else None for other, reason in zip(others, reasons, strict=True)]
    return Row(name, [first.metrics.get(name), *values], differences, incomparable)


def difference(metric: str, first: Run, other: Run) -> Difference | None:
    """Return the difference of a metric with its interval; ``None`` if the metric is not a mean over rows."""
    one, two = (row_values(metric, run.rows["rank"]) for run in (first, other))
    if one is None or two is None or metric not in first.metrics or metric not in other.metrics:
        return None
    return Difference(*paired_bootstrap(one, two))


def render(found: Comparison, style: Format = "table") -> str:
    """Return a comparison as text.

    Args:
        found: The comparison.
        style: Format. ``table`` and ``markdown`` end with the notes. ``csv`` has separate columns for a difference and the ends of
            its interval. ``json`` also contains the folders of the runs.
    """
    if style == "json":
        return _json(found)
    if style == "csv":
        return _csv(found)
    header, rows = found.cells()
    if style == "markdown":
        return "\n".join([markdown_table(header, rows), "", *(f"- {for_markdown(note)}" for note in found.notes())]) + "\n"
    return "\n".join([plain_table(header, rows), "", *map(for_terminal, found.notes())]) + "\n"


def _csv(found: Comparison) -> str:
    header = ["metric", found.headings[0]]
    for heading, reason in zip(found.headings[1:], found.reasons, strict=True):
        header += [heading, *([f"{heading}: {name}" for name in ("difference", "low", "high")] if reason is None else [])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(for_csv, header))
    for row in found.rows:
        cells: list[object] = [row.metric, row.values[0]]
        for value, own, reason in zip(row.values[1:], row.differences, found.reasons, strict=True):
            cells += [value, *((own or (None,) * 3) if reason is None else ())]
        writer.writerow(cells)
    return text.getvalue()


def _json(found: Comparison) -> str:
    runs = [
        {"name": heading, "folder": Path(run.folder).as_posix(), "model": run.model or None, "not_paired": reason}
        for heading, run, reason in zip(found.headings, found.runs, [None, *found.reasons], strict=True)
    ]
    metrics = [
        {
            "metric": row.metric,
            "values": row.values,
            "differences": [None, *(own and own._asdict() for own in row.differences)],
            "not_comparable": [None, *(problem or None for problem in row.incomparable)],
        }
        for row in found.rows
    ]
    return json.dumps({"runs": runs, "metrics": metrics}, indent=2) + "\n"


def _is_main(name: str) -> bool:
    stem, _, cut = name.rpartition("_")
    return not (stem and cut.isdigit()) or cut == "10" or stem == "hits"
