"""Report of a run: metrics as JSON, a Markdown page and figures."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from malleable.callbacks.report.logged import newly_logged
from malleable.callbacks.report.metric_notes import definitions, is_secondary, with_arrow
from malleable.callbacks.report.page import (
    Column,
    HasColumns,
    HasHeadlineMetrics,
    HasPhases,
    HasRows,
    HasSections,
    Rows,
    Section,
    figure_names,
    markdown,
    plain_table,
)
from malleable.callbacks.report.plots import COLORS, draw_curves, draw_phases, is_noisy, save_figure, split_curve
from malleable.callbacks.report.row_recorder import RowRecorder
from malleable.datamodules.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 2048
PANELS_A_ROW = 3
SMOOTHED = "Noisy training curves are shown as running means. The values of single steps are drawn faintly."


class RunReport(Callback):
    """Write ``report/metrics.json``, ``report/report.md`` and PNG figures to the run folder, after fit and again after test.

    ``metrics.json`` contains the last value of each logged metric. The page contains the test metrics, the curves of all metrics that are logged
    during training, and contributions of other callbacks, whose methods are called on rank zero:

    - ``report_sections() -> list[Section]``: sections of the page;
    - ``report_columns() -> list[Column]``: other models for comparison, whose metrics are also written to ``metrics.json``;
    - ``report_rows() -> Mapping[str, Sequence[float]]``: per-row values by metric name, for confidence intervals;
    - ``report_phases() -> list[tuple[int, str]]``: phases of training, which are shown in the curves.

    If the data module has a method ``data_summary() -> list[tuple[str, str]]``, its output is added to the page.

    Metrics of the models for comparison are sent to the loggers once, after the test.

    If the module ranks answers, ``test_rows.safetensors`` contains ``sample_id``, ``target`` and ``rank`` of each test row, and in its metadata
    checksums of the test conditions and of the inputs of metrics, such as genres. ``malleable compare`` reads this file.

    Args:
        dirpath: Folder of the report; default: ``report`` in the run folder.
        headline: Metrics, without the prefix ``test_``, that are shown in the log and at the top of the page. Default: the ``headline_metrics`` of
            the tested module and of the callbacks. If the test has none of them, all metrics are shown.
    """

    def __init__(self, dirpath: str | None = None, headline: Sequence[str] | None = None) -> None:
        self.dirpath = dirpath
        self.headline: tuple[str, ...] | None = None if headline is None else tuple(headline)
        self.folder: Path | None = None
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, str] = {}
        self.rows = RowRecorder()
        self.phases: list[tuple[int, str]] = []
        self.seconds = 0.0
        self._earlier = 0.0  # seconds before the run was resumed, which are included in `seconds`
        self._started: float | None = None
        self._last_step = -1
        self._recorded: dict[str, Any] = {}
        self._fits = False

    def state_dict(self) -> dict[str, Any]:
        """Return the curves, the training time and the last values."""
        history = {name: [list(point) for point in points] for name, points in self.history.items()}
        return {"history": history, "seconds": self._elapsed(), "metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of the interrupted run. A test after a fit keeps the curves of the fit, although it loads an earlier checkpoint."""
        if self._fits or not self.history:
            self.history = {name: [(int(step), float(value)) for step, value in points] for name, points in state_dict["history"].items()}
            self.seconds = self._earlier = state_dict["seconds"]
        if self._fits:
            # If the run was killed after its last step, no values are logged again.
            self.metrics = {name: value for name, value in state_dict.get("metrics", {}).items() if not name.startswith("test_")}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder, which is the same on all ranks."""
        folder = trainer.log_dir or trainer.default_root_dir
        self.folder = Path(self.dirpath or Path(folder) / "report")
        self._fits = stage == "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the training time."""
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record logged values every ``log_every_n_steps`` steps and at the end of an epoch."""
        step = trainer.global_step
        due = step % max(1, trainer.log_every_n_steps) == 0 or trainer.is_last_batch  # type: ignore[attr-defined]
        if due and step != self._last_step:
            self._last_step = step
            self._record(trainer, validation=False)
        if trainer.is_last_batch:
            self.metrics.update(_to_floats(trainer.callback_metrics))  # a checkpoint may be saved after this hook

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the validation metrics."""
        if not trainer.sanity_checking:
            self._record(trainer, validation=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last values before a checkpoint is saved."""
        self.metrics.update(_to_floats(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last values and the training time."""
        self.metrics.update(_to_floats(trainer.callback_metrics))
        self.seconds, self._started = self._elapsed(), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record steps, epochs and training time, also if a resumed run has no steps left."""
        self.seconds, self._started = self._elapsed(), None
        resumed = f", of which {self.seconds - self._earlier:.0f} s after the run was resumed" if self._earlier else ""
        self.facts |= {
            "optimizer steps": str(trainer.global_step),
            "epochs": str(trainer.current_epoch),
            "training time": f"{self.seconds:.0f} s{resumed}",
        }

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the metrics of an earlier test, and start to collect rows."""
        self.metrics = {name: value for name, value in self.metrics.items() if not name.startswith("test_")}
        self.rows.start(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the rows of a batch."""
        self.rows.count(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all processes."""
        self.rows.finish(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the test metrics and their inputs, the number of rows and the checkpoint."""
        self.rows.read_inputs(pl_module)
        self.metrics.update(_to_floats(trainer.callback_metrics))
        if self.rows.number:
            self.facts["test rows"] = f"{self.rows.number:,}"
        if trainer.ckpt_path:
            self.facts["tested checkpoint"] = str(trainer.ckpt_path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the report. At this point, the test and fit hooks of all callbacks have been called."""
        if stage not in ("fit", "test") or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        contributors = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        columns = [column for callback in contributors if isinstance(callback, HasColumns) for column in callback.report_columns()]
        sections = [section for callback in contributors if isinstance(callback, HasSections) for section in callback.report_sections()]
        for callback in contributors:
            if isinstance(callback, HasRows):
                self.rows.add(callback.report_rows())
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            self.facts["seed"] = seed
        sections += _data_sections(getattr(trainer, "datamodule", None))
        self.phases = [phase for callback in contributors if isinstance(callback, HasPhases) for phase in callback.report_phases()]
        self.facts["devices"] = f"{trainer.world_size} × {trainer.strategy.root_device.type}"
        declared = [name for source in (pl_module, *contributors) if isinstance(source, HasHeadlineMetrics) for name in source.headline_metrics]
        headline = declared if self.headline is None else self.headline
        self.write(_title(trainer, pl_module), type(pl_module).__name__, columns, sections, headline)
        if stage == "test":
            self._log(trainer, columns)

    def write(self, title: str, name: str, columns: Sequence[Column] = (), sections: Sequence[Section] = (), headline: Sequence[str] = ()) -> None:
        """Write all files atomically, and log the main metrics.

        Args:
            title: Title of the page.
            name: Name of the tested model.
            columns: Metrics of other models.
            sections: Sections of other callbacks.
            headline: Names of the main metrics.
        """
        assert self.folder is not None
        header, rows = self._comparison(name, columns)
        main = [row for row in rows if row[0] in headline] or rows
        sections = [*self._first_sections(header, main, headline), *sections, *self._last_sections(header, rows if len(rows) > len(main) else [])]
        self.rows.save(self.folder)
        everything = self.metrics | _flatten_columns(columns)
        finite = {key: value if math.isfinite(value) else None for key, value in everything.items()}
        for section, figure_name in zip(sections, figure_names(sections), strict=True):
            if section.figure is not None:
                save_figure(self.folder / figure_name, section.figure, section.figure_size)
        with atomic_write(self.folder / "report.md") as path:
            path.write_text(markdown(title, sections), encoding="utf-8")
        with atomic_write(self.folder / "metrics.json") as path:
            path.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
        table = "\n" + plain_table(header, main) if main else ""
        rank_zero_info(f"{title}{table}\nreport: {self.folder / 'report.md'}")

    def _log(self, trainer: Trainer, columns: Sequence[Column]) -> None:
        """Send the metrics of the other models to the loggers. Those of the tested model have already been logged."""
        finite = {name: value for name, value in _flatten_columns(columns).items() if math.isfinite(value)}
        for logger in trainer.loggers if finite else ():
            logger.log_metrics(finite, step=trainer.global_step)
            logger.save()

    def _first_sections(self, header: Sequence[str], rows: Rows, headline: Sequence[str]) -> list[Section]:
        sections = [self._metrics_section("Test metrics", header, rows)] if rows else []
        panels = curve_panels({name: points for name, points in self.history.items() if not is_secondary(name, headline)})
        if panels:
            size = (4.2 * min(PANELS_A_ROW, len(panels)), 3.0 * -(-len(panels) // PANELS_A_ROW))
            text = SMOOTHED if any(is_noisy(curve[1]) for curves in panels.values() for name, curve in curves.items() if _is_training(name)) else ""
            sections.append(Section("Training", text, figure=lambda figure: draw_panels(figure, panels, self.phases), figure_size=size))
        return sections

    def _last_sections(self, header: Sequence[str], rows: Rows) -> list[Section]:
        sections = [self._metrics_section("All test metrics", header, rows)] if rows else []
        tested = [key.removeprefix("test_") for key in self.metrics if key.startswith("test_")]
        if meanings := definitions(tested):
            sections.append(Section("Definitions of the metrics", table=(("metric", "better", "definition"), meanings)))
        return [*sections, Section("Run", table=(("property", "value"), list(self.facts.items())))]

    def _metrics_section(self, title: str, header: Sequence[str], rows: Rows) -> Section:
        """Return a table of metrics with arrows, and with confidence intervals if the values of single rows are known."""
        intervals = [self.rows.interval(row[0]) for row in rows]
        marks = [[with_arrow(name), *values] for name, *values in rows]
        if not any(intervals):
            return Section(title, table=(header, marks))
        text = (
            "↑: higher is better, ↓: lower is better. Intervals: bootstrap over the test rows of this run. They do not contain the variation between "
            "seeds, which can be larger."
        )
        rows = [[name, own, interval, *others] for (name, own, *others), interval in zip(marks, intervals, strict=True)]
        return Section(title, text, table=([*header[:2], "95 % interval", *header[2:]], rows))

    def _comparison(self, name: str, columns: Sequence[Column]) -> tuple[list[str], list[list[Any]]]:
        own = {key.removeprefix("test_"): value for key, value in self.metrics.items() if key.startswith("test_")}
        rows = [[metric, value, *(column.values.get(metric) for column in columns)] for metric, value in own.items()]
        return ["metric", name, *(column.title for column in columns)], rows

    def _record(self, trainer: Trainer, validation: bool) -> None:
        for name, value in newly_logged(trainer.callback_metrics, self._recorded).items():
            if name.startswith("val_") == validation and not name.startswith("test_"):
                self._recorded[name] = value
                points = self.history.setdefault(name, [])
                points.append((trainer.global_step, float(value)))
                if len(points) > MAX_POINTS:
                    del points[1:-1:2]

    def _elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self._started if self._started is not None else 0.0)


def curve_panels(history: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Group curves into panels. Each panel contains one metric with all its splits and cut-offs.

    Args:
        history: Steps and values by logged key.

    Returns:
        Panels by metric. A panel contains abscissas and ordinates by split and cut-off. Metrics whose curves have fewer than two points are omitted.
    """
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for name, points in history.items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        split, metric, cut = re.fullmatch(r"(train_|val_)?(.+?)(_\d+)?", name).groups(default="")  # type: ignore[union-attr]
        if finite:
            label = (split.rstrip("_") + (f" @{cut[1:]}" if cut else "")).strip() or metric
            panels.setdefault(metric, {})[label] = ([step for step, _ in finite], [value for _, value in finite])
    return {metric: curves for metric, curves in panels.items() if any(len(steps) > 1 for steps, _ in curves.values())}


def draw_panels(figure: Figure, panels: Mapping[str, Mapping[str, tuple[list[int], list[float]]]], phases: Sequence[tuple[int, str]] = ()) -> None:
    """Draw each panel on its own axes.

    Args:
        figure: Figure to draw on.
        panels: Output of :func:`curve_panels`.
        phases: First optimizer step and name of each phase. Training curves have gaps between phases of different names. The phases are shaded.
    """
    columns = min(PANELS_A_ROW, len(panels))
    all_axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    # A curve name, e.g. "val @10", has the same colour in all panels that have several curves.
    names = dict.fromkeys(name for curves in panels.values() if len(curves) > 1 for name in curves)
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    for axes, (metric, curves) in zip(all_axes, panels.items(), strict=False):
        split = {name: split_curve(curve, phases) if _is_training(name) else curve for name, curve in curves.items()}
        draw_curves(axes, split, title=metric, smoothed=[name for name in split if _is_training(name)], colors=colors)
        draw_phases(axes, phases, max(x[-1] for x, _ in curves.values()))
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)


def _is_training(name: str) -> bool:
    """Return whether the values of a curve come from single training steps, not from a whole split."""
    return not name.startswith("val")


def _flatten_columns(columns: Sequence[Column]) -> dict[str, float]:
    return {f"{column.key}_{metric}": value for column in columns for metric, value in column.values.items()}


def _to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _data_sections(data: Any) -> list[Section]:
    """Return a section with the summary of the data module; an empty list if it has none."""
    describe = getattr(data, "data_summary", None)
    return [Section("Data", table=(("property", "value"), describe()))] if callable(describe) else []


def _title(trainer: Trainer, module: LightningModule) -> str:
    source = getattr(trainer, "datamodule", None)
    origin = getattr(source, "source", None) or source
    return type(module).__name__ + (f" on {type(origin).__name__}" if origin is not None else "")
