"""Comparison of a recommender before and after self-play, for the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from malleable.callbacks.report.page import Section
from malleable.callbacks.report.plots import draw_curves, draw_exposure, draw_exposure_curve
from malleable.callbacks.row_pass import inference_mode
from malleable.datamodules.batch import AnswerBatch
from malleable.datamodules.files.escape import for_markdown
from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows
from malleable.lightning_modules.language.language_model import LanguageModel

CURVES = ("hr_10", "ndcg_10", "div_ratio_10", "or_ratio_10", "mgu_10", "dgu_10")


def recommendation_counts(items: Tensor, sample_id: Tensor, num_items: int) -> Tensor:
    """Count how often each item was recommended, ``(N,)``.

    Args:
        items: Recommended items, ``(B, k)``; -1 for positions without an item.
        sample_id: Ids of the rows, ``(B,)``; negative for repeated rows, which are not counted.
        num_items: Number of items, N.
    """
    kept = items[sample_id >= 0]
    return torch.bincount(kept[kept >= 0], minlength=num_items)


def evaluate_recommender(trainer: Trainer, module: LanguageModel, loader: Any) -> dict[str, Any]:
    """Evaluate a recommender outside the test loop.

    Args:
        trainer: Trainer, for the device and for sums over ranks.
        module: Module with the methods ``configure_metrics`` and ``evaluate``.
        loader: Loader with the batches of this rank.

    Returns:
        ``figures``: metrics by name. ``counts``: number of recommendations of each item, ``(N,)`` on the CPU. ``protocol``: output of
        :func:`evaluation_protocol`.
    """
    metrics = {name: metric.to(module.device) for name, metric in module.configure_metrics().items()}
    assert module.catalog is not None
    counts = torch.zeros(len(module.catalog), dtype=torch.long, device=module.device)
    rows = torch.zeros(2, dtype=torch.long, device=module.device)
    with inference_mode(trainer, module):
        for batch in loader:
            moved = trainer.strategy.batch_to_device(batch)
            found = module.evaluate(moved, metrics)
            assert found is not None
            counts += recommendation_counts(found.item_ids, moved.sample_id, len(counts))
            rows += hash_batch(moved)
    figures = {key: float(value) for metric in metrics.values() for key, value in metric.compute().items()}
    counts, rows = (trainer.strategy.reduce(total, reduce_op="sum").cpu() for total in (counts, rows))
    return {"figures": figures, "counts": counts, "protocol": evaluation_protocol(module, rows)}


def hash_batch(batch: AnswerBatch) -> Tensor:
    """Compute number and hash of the rows of a batch, ``(2,)``, to be summed over batches and ranks."""
    return hash_rows(batch.sample_id, [batch.target[:, None], batch.history, batch.metric_history, batch.seen, batch.candidates])


def evaluation_protocol(module: LanguageModel, rows: Tensor) -> dict[str, str]:
    """Describe test rows, items, metrics and decoding as texts, by name. Metrics of different protocols must not be compared.

    Args:
        module: Module with the method ``configure_metrics``, and the attribute ``decoding`` if it decodes.
        rows: Sum of :func:`hash_batch` over all rows.
    """
    catalog, decoding = module.catalog, getattr(module, "decoding", None)
    assert catalog is not None
    count, total = rows.tolist()
    items = hashlib.sha256(json.dumps([catalog.titles, catalog.genres, catalog.popularity]).encode()).hexdigest()[:12]
    search: dict[str, Any] = {}  # empty for modules without decoding, such as counting baselines
    if decoding is not None:
        search = {"exclude_seen": decoding.exclude_seen, "grounding": decoding.grounding}
        if decoding.grounding == "trie":
            search |= {"num_beams": max(decoding.num_beams, *module.ks), "renormalize": decoding.renormalize}
        else:
            search |= {"max_new_tokens": decoding.max_new_tokens}
    metrics = {name: f"{type(metric).__name__} at {list(getattr(metric, 'ks', []))}" for name, metric in module.configure_metrics().items()}
    return {
        "test rows": f"{count} rows ({total & (1 << 64) - 1:016x})",
        "items and their popularity": f"{len(catalog)} items ({items})",
        "metrics": json.dumps(metrics, sort_keys=True),
        "decoding": json.dumps(search, sort_keys=True),
    }


def protocol_difference(stored: Mapping[str, str] | None, tested: Mapping[str, str]) -> str:
    """Return a text with the differences of two protocols; empty if they are equal."""
    if stored is None:
        return "an earlier version stored them without the evaluation protocol"
    return "; ".join(f"{name}: {stored.get(name)} before, {value} in this test" for name, value in tested.items() if stored.get(name) != value)


def self_play_sections(
    history: Sequence[dict[str, Any]],
    before: dict[str, Any],
    after: Tensor | None,
    titles: Sequence[str],
    difference: str = "",
    keys: Sequence[str] = (),
) -> list[Section]:
    """Return the sections of self-play for the report.

    Args:
        history: Logged values of each finished phase, and statistics of the answers of each round.
        before: Output of :func:`evaluate_recommender` before self-play; may be empty.
        after: Number of recommendations of each item by the tested model.
        titles: Titles of the items.
        difference: Text with the differences between the protocols of ``before`` and of the test. If it is not empty, ``before`` is not shown.
        keys: Ids of the items; empty if they have none.
    """
    sections = []
    negatives = [entry for entry in history if entry["phase"] == "negatives"]
    if negatives:
        names = [name for name in negatives[0] if name not in ("phase", "round")]
        rows = [[entry["round"], *(entry[name] for name in names)] for entry in negatives]
        text = (
            "Statistics of the rejected answers. `frac_identical`: share of rows whose rejected answer is the true title. `distinct_negs`: number of "
            "distinct answers divided by the number of answers."
        )
        sections.append(Section("Rejected answers", text, table=(["round", *names], rows)))
    compared = [entry for entry in history if entry["phase"] == "decoding"]
    if compared:
        names = [name for name in compared[0] if name not in ("phase", "round", "titles")]
        rows = [[entry["round"], entry["titles"], *(entry[name] for name in names)] for entry in compared]
        text = (
            "Greedy and sampled answers of the model for some rows of each round, compared with the true titles of these rows. Self-play with "
            "sampled answers changes little if they are distributed like the true titles. Greedy answers are more concentrated."
        )
        sections.append(Section("Greedy and sampled answers", text, table=(["round", "titles", *names], rows)))
    curves = round_curves(history)
    if curves:
        size = (11.0, 3.0 * -(-len(curves) // 3))
        text = "Validation metrics at the end of the warm-up (0) and of each round. A half-integer is the end of a supervised phase."
        sections.append(Section("Rounds", text, figure=lambda figure: _draw_rounds(figure, curves), figure_size=size))
    if difference:
        text = f"The metrics of the model before self-play are not shown, because they cannot be compared with this test: {for_markdown(difference)}."
        sections.append(Section("Supervised model", text))
    elif before and after is not None:
        versions = {"before self-play": before["counts"], "after": after}
        sections.append(Section("Exposure", figure=lambda figure: draw_exposure_curve(figure.subplots(), versions)))
        bars = partial(draw_exposure, versions=versions, titles=titles, keys=keys)
        sections.append(Section("Most recommended titles", figure=lambda figure: bars(figure.subplots()), figure_size=(8.0, 5.5)))
    return sections


def round_curves(history: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return the validation metrics at the ends of phases, by metric.

    Args:
        history: Logged values of each finished phase.

    Returns:
        Abscissas and ordinates by metric. Abscissa 0 is the end of the warm-up, n is the end of round n, and n - 1/2 is the end of its supervised
        phase if a preference phase follows.
    """
    paired = any(entry["phase"] == "dpo" for entry in history)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in CURVES:
        measured = [entry for entry in history if f"val_{name}" in entry]
        if len(measured) > 1:
            x = [entry["round"] - (0.5 if paired and entry["phase"] == "sft" else 0) for entry in measured]
            curves[name] = (x, [entry[f"val_{name}"] for entry in measured])
    return curves


def _draw_rounds(figure: Any, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    columns = min(3, len(curves))
    all_axes = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flatten()
    for axes, (name, points) in zip(all_axes, curves.items(), strict=False):
        draw_curves(axes, {name: points}, title=name, x_label="round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in all_axes[len(curves) :]:
        axes.set_visible(False)
