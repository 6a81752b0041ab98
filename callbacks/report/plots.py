"""Plots for reports. Each function draws on given axes and changes no global state.

To show a plot in the report, return a :class:`Section` with it, see ``page.py``.

Shapes: N items of the catalogue, E entities of a graph.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malleable.callbacks.report.fonts import drawable, installed_families
from malleable.datamodules.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLE: Any = {  # Any, because matplotlib accepts only its literal keys
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 150,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.8,
}
TITLE_LENGTH = 38
MAX_DOTS = 20_000  # maximum number of points in a scatter plot
BINS = 12  # number of bins of the abscissa for medians
LONG = 40  # minimum number of points of a noisy curve
NOISY = 0.25  # minimum share of turning points of a noisy curve
MIN_WINDOW, WINDOWS = 5, 15  # a running mean uses at least 5 points, or 1/15 of the points of the curve
SHORT_LABEL = 14  # labels up to this length are arranged in three columns of a legend, longer ones in two
LEGEND_PAD, LEGEND_ROW = 24.0, 14.0  # distance in points between axes and title for a legend of one row, and for each further row

Counts = Tensor | Sequence[float]


def save_figure(path: Path, draw: Callable[[Figure], None], size: tuple[float, float] = (8.0, 4.5)) -> None:
    """Draw a figure of ``size`` inches and write it atomically as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"font.family": list(installed_families())}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # combining characters, which fonts can draw in another way
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        with atomic_write(path) as temporary:
            figure.savefig(temporary)


def draw_curves(
    axes: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
    x_label: str = "optimizer step",
    y_label: str = "",
    smoothed: Collection[str] = (),
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw curves.

    Args:
        axes: Axes to draw on.
        curves: Abscissas and ordinates by name.
        title: Title.
        x_label: Label of the abscissa.
        y_label: Label of the ordinate.
        smoothed: Names of curves that are drawn as running means if they are noisy. The original values are drawn faintly behind them.
        colors: Colour of each curve; default: :data:`COLORS` in order.
    """
    for index, (name, (x, y)) in enumerate(curves.items()):
        color = (colors or {}).get(name, COLORS[index % len(COLORS)])
        if name in smoothed and is_noisy(y):
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.25)
            y = running_mean(y, max(MIN_WINDOW, len(y) // WINDOWS))
        axes.plot(x, y, color=color, marker="o" if len(x) <= 30 else "", markersize=4, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title)
    axes.margins(x=0.02)
    if len(curves) > 1:
        add_legend(axes)


def is_noisy(values: Sequence[float]) -> bool:
    """Return whether a curve has many points and a large share of turning points.

    Args:
        values: Ordinates in order; ``nan`` is a gap.
    """
    steps = [later - earlier for earlier, later in pairwise(values) if later != earlier]
    turns = sum(one * two < 0 for one, two in pairwise(steps))
    return len(values) >= LONG and turns >= NOISY * len(values)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Compute the running mean. Windows are cut at the ends of the curve and at gaps.

    Args:
        values: Values in order; ``nan`` is a gap.
        width: Number of values in a window; an even number is increased by one.
    """
    means: list[float] = []
    for is_gap, part in groupby(values, key=math.isnan):
        own = list(part)
        if is_gap:
            means += own
            continue
        sums = [0.0, *accumulate(own)]
        for index in range(len(own)):
            low, high = max(0, index - width // 2), min(len(own), index + width // 2 + 1)
            means.append((sums[high] - sums[low]) / (high - low))
    return means


def add_legend(axes: Axes) -> None:
    """Add a legend between title and axes, so that it does not cover the plot."""
    labels = axes.get_legend_handles_labels()[1]
    columns = min(len(labels), 3 if max(map(len, labels)) <= SHORT_LABEL else 2)
    rows = -(-len(labels) // columns)
    axes.set_title(axes.get_title(loc="left") or axes.get_title(), pad=LEGEND_PAD + LEGEND_ROW * (rows - 1))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=columns, borderaxespad=0.2, columnspacing=1.2, handlelength=1.6)


def split_curve(curve: tuple[Sequence[float], Sequence[float]], phases: Sequence[tuple[int, str]]) -> tuple[list[float], list[float]]:
    """Insert gaps into a curve between phases of different names, because their losses are different.

    Args:
        curve: Abscissas in ascending order, and ordinates.
        phases: First step and name of each phase, in ascending order. A point at the first step of a phase belongs to the previous phase.
    """
    x, y = list(curve[0]), list(curve[1])
    borders = [step for (_, earlier), (step, name) in pairwise(phases) if name != earlier]
    for step in borders:
        index = bisect_right(x, step)
        if 0 < index < len(x):
            x.insert(index, step)
            y.insert(index, float("nan"))
    return x, y


def draw_phases(axes: Axes, phases: Sequence[tuple[int, str]], end: float) -> None:
    """Shade all phases whose name differs from that of the first phase, and add the names to the legend.

    Args:
        axes: Axes with the curves.
        phases: First step and name of each phase, in ascending order.
        end: Last step.
    """
    names = list(dict.fromkeys(name for _, name in phases))
    if len(names) < 2:
        return
    ends = [step for step, _ in phases[1:]] + [end]
    for (start, name), stop in zip(phases, ends, strict=True):
        if name != names[0] and start < stop:
            first = name not in axes.get_legend_handles_labels()[1]
            axes.axvspan(start, stop, color=COLORS[names.index(name) % len(COLORS)], alpha=0.12, linewidth=0, label=name if first else None)
    add_legend(axes)


def draw_exposure(axes: Axes, versions: Mapping[str, Counts], titles: Sequence[str], top: int = 12, keys: Sequence[str] = ()) -> None:
    """Draw the shares of the most recommended titles as horizontal bars, with one colour for each version.

    Args:
        axes: Axes to draw on.
        versions: Counts of each item, ``(N,)``, by name of the version.
        titles: Titles of the N items.
        top: Number of titles. The titles with the largest share in any version are drawn, ordered by their share in the first version.
        keys: Ids of the items, for titles that no installed font can draw.
    """
    shares = _shares(versions)
    stacked = torch.stack(list(shares.values()))
    chosen = stacked.amax(0).argsort(descending=True, stable=True)[:top]
    chosen = chosen[stacked[0, chosen].argsort(descending=True, stable=True)]
    height = 0.8 / len(shares)
    for index, (name, share) in enumerate(shares.items()):
        positions = [bar + (index - (len(shares) - 1) / 2) * height for bar in range(len(chosen))]
        axes.barh(positions, (100 * share[chosen]).tolist(), height, color=COLORS[index % len(COLORS)], label=name)
    axes.set_yticks(range(len(chosen)), [short_title(titles[item], key=keys[item] if keys else "") for item in chosen.tolist()])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share (%)")
    axes.set_title("Most recommended titles")
    if len(shares) > 1:
        add_legend(axes)


def draw_exposure_curve(axes: Axes, versions: Mapping[str, Counts]) -> None:
    """Draw the share of the n most frequent items in all recommendations, for all n.

    Args:
        axes: Axes to draw on.
        versions: Counts of each item, ``(N,)``, by name, e.g. of recommendations and of training interactions.
    """
    for index, (name, share) in enumerate(_shares(versions).items()):
        cumulative = 100 * share.sort(descending=True).values.cumsum(0)
        axes.plot(range(1, len(cumulative) + 1), cumulative.tolist(), color=COLORS[index % len(COLORS)], label=name)
    _set_log_scale(axes)
    axes.set_ylim(0, 102)
    axes.set(title="Concentration of exposure", xlabel="n most frequent items", ylabel="cumulative share (%)")
    add_legend(axes)


def draw_uncertainty(axes: Axes, degree: Tensor, uncertainty: Tensor, correlation: float) -> None:
    """Draw the uncertainty of entities against their numbers of triples, with medians of bins.

    Args:
        axes: Axes to draw on.
        degree: Numbers of triples ``(E,)``, positive.
        uncertainty: Uncertainty ``(E,)``.
        correlation: Rank correlation of degree and uncertainty, for the title.
    """
    # Draw points at equal distances in the order of degrees, so that the few entities with many triples are included.
    order = degree.argsort(stable=True)
    drawn = order[torch.linspace(0, len(order) - 1, min(len(order), MAX_DOTS)).long()]
    size, alpha = (16, 0.5) if len(drawn) <= 1000 else (4, 0.15)
    axes.scatter(degree[drawn].tolist(), uncertainty[drawn].tolist(), size, COLORS[0], alpha=alpha, linewidths=0)
    axes.scatter([], [], 16, COLORS[0], label="entity")  # an opaque point for the legend
    scale = degree.double().log()
    edges = torch.linspace(float(scale.min()), float(scale.max()), BINS + 1, dtype=torch.double)[1:-1]
    bins = [part for part in torch.split(order, torch.bucketize(scale, edges).bincount(minlength=BINS).tolist()) if len(part)]
    medians = [[float(values[part].float().median()) for part in bins] for values in (degree, uncertainty)]
    axes.plot(*medians, color=COLORS[1], marker="o", markersize=4, label="median of a bin of degrees")
    _set_log_scale(axes)
    axes.set(title=f"Uncertainty of entities (Spearman {correlation:+.2f})", xlabel="training triples of the entity", ylabel="mean deviation")
    add_legend(axes)


def _set_log_scale(axes: Axes) -> None:
    """Use a logarithmic abscissa with plain numbers: 3 instead of 3 × 10⁰."""
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # no minor labels on long axes


def short_title(title: str, length: int = TITLE_LENGTH, key: str = "") -> str:
    """Shorten a long title in the middle, replace characters that cannot be drawn, and escape dollar signs, which would start a formula."""
    title = drawable(title, key)
    end = 7  # length of a year in brackets, which many titles end with
    cut = title if len(title) <= length else f"{title[: length - end - 1].rstrip()}…{title[-end:]}"
    return cut.replace("$", r"\$")


def _shares(versions: Mapping[str, Counts]) -> dict[str, Tensor]:
    if not versions:
        raise ValueError("versions is empty; give counts by name")
    counts = {name: torch.as_tensor(values).double() for name, values in versions.items()}
    if len({len(values) for values in counts.values()}) != 1:
        raise ValueError(f"all versions must count the same items, got { ({name: len(values) for name, values in counts.items()}) }")
    return {name: values / values.sum().clamp_min(1) for name, values in counts.items()}
