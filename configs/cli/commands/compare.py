"""``malleable compare``: the test metrics of several runs side by side, with paired intervals where the runs tested the same rows; without torch."""

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

from malleable.callbacks.report.metric_notes import marked
from malleable.callbacks.report.page import markdown_table, number, plain_table
from malleable.commands.reported_runs import Run, load_run, why_unpaired
from malleable.datamodules.files.escape import for_csv, for_markdown
from malleable.lightning_modules.metrics.significance import paired_bootstrap, row_values
from malleable.recipes import similar

log = logging.getLogger(__name__)

Format = Literal["table", "markdown", "csv", "json"]

HELP = """usage: malleable compare [--all] [--format FORMAT] RUN RUN [RUN ...]

Show the test metrics of runs side by side; differences to the first run have paired 95 % intervals where the test rows are the same.

  RUN              a run folder such as runs/sprec/tiny/version_0, or the name of a recipe such as sprec/tiny for its latest fit below `runs`
  --all            show all metrics and cut-offs
  --format FORMAT  table (default), markdown, csv or json
"""


class Difference(NamedTuple):
    """A metric of a run less that of the first one.

    Attributes:
        mean: Over the test rows.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the difference with its interval, and a mark where that excludes 0."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{' *' if self.low > 0 or self.high < 0 else '  '}"


class Row(NamedTuple):
    """A metric of all runs.

    Attributes:
        metric: Its name.
        values: Its value of each run; ``None`` where a run does not have it.
        differences: Of each run but the first; ``None`` where rows are not paired, or the metric is no mean over rows.
    """

    metric: str
    values: list[float | None]
    differences: list[Difference | None]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: The first one is the one to compare with.
        headings: Of the runs: their names, behind the models where these differ.
        rows: The metrics.
        reasons: Why each run but the first is not paired with it; ``None`` where it is.
    """

    runs: Sequence[Run]
    headings: Sequence[str]
    rows: Sequence[Row]
    reasons: Sequence[str | None]

    def notes(self) -> list[str]:
        """Return what is to be said of the runs."""
        notes = [run.note for run in self.runs if run.note]
        if any(reason is None for reason in self.reasons):
            notes.append("differences to the first run: paired bootstrap over the test rows, seed 0; * where the interval excludes 0")
        return notes + [f"{heading}: {reason}" for heading, reason in zip(self.headings[1:], self.reasons, strict=True) if reason is not None]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table."""
        header = ["metric", self.headings[0]]
        for heading, reason in zip(self.headings[1:], self.reasons, strict=True):
            header += [heading, "difference (95 %)" if reason is None else "not paired"]
        rows = []
        for row in self.rows:
            cells = [marked(row.metric), number(row.values[0])]
            for value, difference in zip(row.values[1:], row.differences, strict=True):
                cells += [number(value), "" if difference is None else str(difference)]
            rows.append(cells)
        return header, rows


def run_compare(words: Sequence[str]) -> None:
    """Run ``malleable compare [--all] [--format FORMAT] RUN RUN...``.

    Args:
        words: Runs: folders such as ``runs/sprec/tiny/version_0``, or names of recipes such as ``sprec/tiny`` for the latest fit below ``runs``. The
            first is the one to compare with. ``--all`` lists all cut-offs, ``--format`` is ``table``, ``markdown``, ``csv`` or ``json``.

    Raises:
        ValueError: If there are fewer than two runs, or an option or a format is unknown.
        FileNotFoundError: If a run or its report is missing.
    """
    if set(words) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return
    names, every, style = _options(words)
    if len(names) < 2:
        raise ValueError("malleable compare needs two runs at least: malleable compare runs/sprec/tiny/version_0 runs/sft/tiny/version_0")
    found = compare([load_run(name) for name in names], every)
    sys.stdout.write(render(found, style))
    if style in ("csv", "json"):
        # Beside the output, which another program reads.
        for note in found.notes():
            log.info("%s", note)


def _options(words: Sequence[str]) -> tuple[list[str], bool, Format]:
    """Return the runs, whether all metrics are shown, and the format."""
    names: list[str] = []
    every, style = False, "table"
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        if option == "--format":
            style = value if equals else waiting.pop(0) if waiting else ""
            if style not in get_args(Format):
                raise ValueError(f"--format {style}: the formats are {', '.join(get_args(Format))}{similar(style, get_args(Format))}")
        elif word == "--all":
            every = True
        elif word.startswith("-"):
            raise ValueError(f"malleable compare has no option {word}{similar(word, ('--all', '--format'))}; its options are --all and --format")
        else:
            names.append(word)
    return names, every, style  # type: ignore[return-value]


def compare(runs: Sequence[Run], every: bool = False) -> Comparison:
    """Put runs side by side.

    Args:
        runs: The first one is the one to compare with.
        every: List all metrics, not only those at cut-off 10 and without a cut-off.
    """
    first, *others = runs
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown = [name for name in names if every or _is_main(name)] or names
    reasons = [why_unpaired(first, other) for other in others]
    rows = [
        Row(
            name,
            [run.metrics.get(name) for run in runs],
            [difference(name, first, other) if reason is None else None for other, reason in zip(others, reasons, strict=True)],
        )
        for name in shown
    ]
    several = len({run.model for run in runs}) > 1
    headings = [f"{run.model} {run.name}" if several and run.model else run.name for run in runs]
    return Comparison(runs, headings, rows, reasons)


def difference(metric: str, first: Run, other: Run) -> Difference | None:
    """Return the difference of a metric with its interval; ``None`` where it is no mean over rows."""
    one, two = (row_values(metric, run.rows["rank"]) for run in (first, other))
    if one is None or two is None or metric not in first.metrics or metric not in other.metrics:
        return None
    return Difference(*paired_bootstrap(one, two))


def render(found: Comparison, style: Format = "table") -> str:
    """Return a comparison as text.

    Args:
        found: The comparison.
        style: ``table`` and ``markdown`` have the notes below; ``csv`` has a column for each value; ``json`` has everything.
    """
    if style == "json":
        return _json(found)
    if style == "csv":
        return _csv(found)
    header, rows = found.cells()
    if style == "markdown":
        return "\n".join([markdown_table(header, rows), "", *(f"- {for_markdown(note)}" for note in found.notes())]) + "\n"
    return "\n".join([plain_table(header, rows), "", *found.notes()]) + "\n"


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
        {"metric": row.metric, "values": row.values, "differences": [None, *(own and own._asdict() for own in row.differences)]} for row in found.rows
    ]
    return json.dumps({"runs": runs, "metrics": metrics}, indent=2) + "\n"


def _is_main(name: str) -> bool:
    stem, _, cut = name.rpartition("_")
    return not (stem and cut.isdigit()) or cut == "10" or stem == "hits"
