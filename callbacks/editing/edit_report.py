"""What edits did, for the report: fact by fact, batch by batch, and which directions of the model's keys they used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from malleable.callbacks.report.figures import COLORS, short_title
from malleable.callbacks.report.page import Section
from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.evaluation import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 60
MAX_POINTS = 512


class UsedDirections(NamedTuple):
    """Second moments of a layer's keys along their principal directions.

    Attributes:
        values: ``(d,)`` rising.
        retained: How many of them, from the smallest, edits may use; ``None`` where all may be used.
    """

    values: Tensor
    retained: int | None


def edit_sections(requests: Sequence[EditRequest], before: EvaluationResult, after: EvaluationResult) -> list[Section]:
    """The table of facts before and after.

    Args:
        requests: What was asked for.
        before: What the model said before.
        after: What it says now.
    """
    if not after.requests or not before.requests:
        return []
    worst = sorted(range(len(requests)), key=lambda number: (after.requests[number].efficacy, number))
    shown = sorted(worst[:MAX_ROWS])
    header = ["question", "old → new", "says before", "says after", "new is likelier", "paraphrases", "neighbours kept"]
    rows = []
    for number in shown:
        request, was, now = requests[number], before.requests[number], after.requests[number]
        said = [findings.answers[number] if number < len(findings.answers) else None for findings in (before, after)]
        shares = [f"{_share(getattr(was, name))} → {_share(getattr(now, name))}" for name in ("efficacy", "generalization", "specificity")]
        question = short_title(request.prompt.replace(PLACEHOLDER, request.subject), 60)
        rows.append([question, f"{request.true or '?'} → {request.target}", *said, *shares])
    text = "Shares are of questions, before → after; a neighbour is kept while its own answer is likelier than the new one."
    if len(requests) > len(shown):
        text += f" Of {len(requests)} facts, the {len(shown)} that hold least."
    return [Section("Facts before and after", text, table=(header, rows))]


def survival_section(survival: Mapping[str, Any]) -> list[Section]:
    """How edits fare after later ones; nothing after a single batch."""
    if len(survival.get("edits", ())) < 2:
        return []
    text = f"Of all facts edited so far, {survival['curve'][-1]:.1f} % hold after the last of {len(survival['edits'])} batches."
    return [Section("Survival of edits", text, figure=lambda figure: _draw_survival(figure, survival), figure_size=(10.5, 4.2))]


def spectrum_section(directions: Mapping[int, UsedDirections], threshold: str) -> list[Section]:
    """Second moments of keys, with the threshold."""
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
            f"Mean squares of the edited projections' inputs over text, along their principal directions; {threshold}.",
            table=(header, rows),
            figure=lambda figure: _draw_spectrum(figure.subplots(), directions),
        )
    ]


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def _draw_survival(figure: Figure, survival: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    left.plot(survival["edits"], survival["curve"], color=COLORS[0], marker="o", markersize=4)
    left.set(title="Facts that hold", xlabel="facts edited so far", ylabel="new answer likelier, %", ylim=(0, 103))
    matrix = torch.tensor(survival["matrix"])
    count = len(matrix)
    image = right.imshow(matrix.numpy(), vmin=0, vmax=100, cmap="viridis", origin="lower", extent=(0.5, count + 0.5, 0.5, count + 0.5))
    right.set(title="By batch", xlabel="facts of batch", ylabel="after batch")
    right.grid(False)
    right.locator_params(integer=True)
    figure.colorbar(image, ax=right, label="%")


def _draw_spectrum(axes: Axes, directions: Mapping[int, UsedDirections]) -> None:
    parted = False
    for number, (layer, (values, retained)) in enumerate(directions.items()):
        color = COLORS[number % len(COLORS)]
        place = torch.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).round().long()
        height = values[place].double().clamp_min(1e-12)
        label = f"layer {layer}" if retained is None else f"layer {layer}: {retained / len(values):.0%} may change"
        axes.plot(((place + 1) / len(values)).tolist(), height.tolist(), color=color, label=label)
        if retained is not None and retained < len(values):
            axes.plot((retained + 0.5) / len(values), float(values[retained - 1 : retained + 1].mean()), "o", color=color, markersize=6)
            parted = True
    bounds = {round(float(values[retained]), 12) for values, retained in directions.values() if retained is not None and retained < len(values)}
    lowest = [float(values[retained - 1]) for values, retained in directions.values() if retained]
    if bounds and max(lowest) <= min(bounds):
        # One threshold parts the directions of every layer.
        axes.axhline(math.sqrt(max(lowest) * min(bounds)), color=COLORS[6], linestyle="--", linewidth=1.2, label="threshold")
    elif parted:
        axes.plot([], [], "o", color=COLORS[6], markersize=6, label="threshold")
    axes.set(yscale="log", xlabel="share of directions, from the least used", ylabel="mean square", title="Spectrum of the second moment")
    axes.legend()
