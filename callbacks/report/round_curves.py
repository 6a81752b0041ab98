"""Curves of validation metrics over the rounds of self-play, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from malleable.callbacks.report.plots import COLORS, draw_curves
from malleable.lightning_modules.base import BaseModule
from malleable.lightning_modules.metrics.ranking import RankingMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("hr_10", "ndcg_10", "div_ratio_10", "or_ratio_10", "mgu_10", "dgu_10")
ERROR = "_error"  # end of the key of a standard error
NORMAL = 1.96  # half width of a 95 % interval in standard errors


class RoundCurve(NamedTuple):
    """Validation metric at the ends of phases.

    Attributes:
        x: Abscissas. 0 is the end of the warm-up, n is the end of round n, and n - 1/2 is the end of its supervised phase if a preference phase
            follows.
        y: Values.
        half_widths: Half widths of the 95 % intervals; empty if they are unknown.
    """

    x: list[float]
    y: list[float]
    half_widths: list[float]


def validation_errors(module: Any) -> dict[str, float]:
    """Return the standard errors of the validation metrics that are means over rows, with keys such as ``val_hr_10_error``.

    Args:
        module: Module after a validation.
    """
    metrics = module.metrics("val").values() if isinstance(module, BaseModule) else ()
    own = [metric for metric in metrics if isinstance(metric, RankingMetrics)]
    return {f"val_{name}{ERROR}": value for metric in own for name, value in metric.standard_errors().items()}


def round_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, RoundCurve]:
    """Return the validation metrics at the ends of phases, by metric. Metrics with fewer than two values are omitted.

    Args:
        history: Logged values of each finished phase, and standard errors of :func:`validation_errors`.
    """
    paired = any(entry["phase"] == "dpo" for entry in history)
    curves: dict[str, RoundCurve] = {}
    for name in CURVES:
        key = f"val_{name}"
        measured = [entry for entry in history if key in entry]
        if len(measured) > 1:
            x = [entry["round"] - (0.5 if paired and entry["phase"] == "sft" else 0) for entry in measured]
            errors = [NORMAL * entry.get(key + ERROR, math.nan) for entry in measured]
            curves[name] = RoundCurve(x, [entry[key] for entry in measured], errors if all(map(math.isfinite, errors)) else [])
    return curves


def draw_rounds(figure: Figure, curves: Mapping[str, RoundCurve]) -> None:
    """Draw each curve on its own axes, with its intervals. The axes of a metric without intervals begin at 0, so that small changes look small."""
    columns = min(3, len(curves))
    all_axes = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flatten()
    for axes, (name, curve) in zip(all_axes, curves.items(), strict=False):
        draw_curves(axes, {name: (curve.x, curve.y)}, title=name, x_label="round")
        if curve.half_widths:
            axes.errorbar(curve.x, curve.y, yerr=curve.half_widths, fmt="none", ecolor=COLORS[0], capsize=3, linewidth=1)
        else:
            axes.set_ylim(0, 1.15 * max(filter(math.isfinite, curve.y), default=0) or 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in all_axes[len(curves) :]:
        axes.set_visible(False)
