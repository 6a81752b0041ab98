"""Sections of the report on edits: table of facts, survival of edits, and spectrum of the second moments of keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from malleable.callbacks.report.page import Section
from malleable.callbacks.report.plots import COLORS, short_title
from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.evaluation import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 60
MAX_POINTS = 512


class UsedDirections(NamedTuple):
    """Eigenvalues of the second moment of a layer's keys, i.e. of the inputs of its edited projection.

    Attributes:
        values: ``(d,)`` eigenvalues in ascending order.
        retained: Number of directions, from the smallest eigenvalue on, that edits may change; ``None`` if all directions may change.
    """

    values: Tensor
    retained: int | None


def edit_sections(requests: Sequence[EditRequest], before: EvaluationResult, after: EvaluationResult) -> list[Section]:
    """Return the table of facts before and after an edit.

    Args:
        requests: Edit requests.
        before: Results before the edit.
        after: Results after the edit.
    """
    if not after.requests or not before.requests:
        return []
    worst = sorted(range(len(requests)), key=lambda number: (after.requests[number].efficacy, number))
    shown = sorted(worst[:MAX_ROWS])
    header = ["prompt", "true → target", "answer before", "answer after", "efficacy", "generalization", "specificity"]
    rows = []
    for number in shown:
        request, old, new = requests[number], before.requests[number], after.requests[number]
        answers = [result.answers[number] if number < len(result.answers) else None for result in (before, after)]
        shares = [f"{_percent(getattr(old, name))} → {_percent(getattr(new, name))}" for name in ("efficacy", "generalization", "specificity")]
        prompt = short_title(request.prompt.replace(PLACEHOLDER, request.subject), 60)
        rows.append([prompt, f"{request.true or '?'} → {request.target}", *answers, *shares])
    text = "Efficacy, generalization and specificity are shares of prompts, before → after the edit."
    if len(requests) > len(shown):
        text += f" The table contains the {len(shown)} of {len(requests)} facts with the lowest efficacy."
    return [Section("Facts before and after", text, table=(header, rows))]


def survival_section(survival: Mapping[str, Any]) -> list[Section]:
    """Return a section on the efficacy of edits after later batches; an empty list if there is only one batch.

    Args:
        survival: Output of :meth:`~malleable.lightning_modules.editing.evaluation.SurvivalEvaluation.compute`; may be empty.
    """
    if len(survival.get("edits", ())) < 2:
        return []
    text = f"After the last of {len(survival['edits'])} batches, {survival['curve'][-1]:.1f} % of all edited facts are effective."
    return [Section("Survival of edits", text, figure=lambda figure: _draw_survival(figure, survival), figure_size=(10.5, 4.2))]


def spectrum_section(directions: Mapping[int, UsedDirections], threshold: str) -> list[Section]:
    """Return the table and figure of the second moments of keys.

    Args:
        directions: Eigenvalues of each layer.
        threshold: Text that describes the threshold.
    """
    if not directions:
        return []
    rows = []
    for layer, (values, retained) in directions.items():
        share = None if retained is None else f"{retained} of {len(values)} ({retained / len(values):.0%})"
        quartiles = torch.quantile(values.double(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.double)).tolist()
        rows.append([f"layer {layer}", share, *quartiles])
    header = ["", "directions that may change", "smallest", "median", "largest"]
    return [
        Section(
            "Second moments of keys",
            f"Eigenvalues of the second moment of the inputs of the edited projections over text; {threshold}.",
            table=(header, rows),
            figure=lambda figure: _draw_spectrum(figure.subplots(), directions),
        )
    ]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def _draw_survival(figure: Figure, survival: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.plot(survival["edits"], survival["curve"], color=COLORS[0], marker="o", markersize=4)
    left.set(title="Efficacy", xlabel="facts edited so far", ylabel="efficacy, %", ylim=(0, 103))
    matrix = torch.tensor(survival["matrix"])
    count = len(matrix)
    image = right.imshow(matrix.numpy(), vmin=0, vmax=100, cmap="viridis", origin="lower", extent=(0.5, count + 0.5, 0.5, count + 0.5))
    right.set(title="By batch", xlabel="facts of batch", ylabel="after batch")
    right.grid(False)
    right.locator_params(integer=True)
    figure.colorbar(image, ax=right, label="%")


def _draw_spectrum(axes: Axes, directions: Mapping[int, UsedDirections]) -> None:
    has_threshold = False
    for number, (layer, (values, retained)) in enumerate(directions.items()):
        color = COLORS[number % len(COLORS)]
        place = torch.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).round().long()
        height = values[place].double().clamp_min(1e-12)
        label = f"layer {layer}" if retained is None else f"layer {layer}: {retained / len(values):.0%} may change"
        axes.plot(((place + 1) / len(values)).tolist(), height.tolist(), color=color, label=label)
        if retained is not None and retained < len(values):
            axes.plot((retained + 0.5) / len(values), float(values[retained - 1 : retained + 1].mean()), "o", color=color, markersize=6)
            has_threshold = True
    bounds = {round(float(values[retained]), 12) for values, retained in directions.values() if retained is not None and retained < len(values)}
    lowest = [float(values[retained - 1]) for values, retained in directions.values() if retained]
    if bounds and max(lowest) <= min(bounds):
        # The same threshold separates the directions of every layer.
        axes.axhline(math.sqrt(max(lowest) * min(bounds)), color=COLORS[6], linestyle="--", linewidth=1.2, label="threshold")
    elif has_threshold:
        axes.plot([], [], "o", color=COLORS[6], markersize=6, label="threshold")
    axes.set(yscale="log", xlabel="share of directions, in ascending order", ylabel="eigenvalue", title="Spectrum of the second moment")
    axes.legend()
