"""Before and after: what a recommender recommended when self-play began, and what it recommends now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from malleable.callbacks.report.figures import draw_curves, draw_exposure, draw_exposure_curve
from malleable.callbacks.report.page import Section
from malleable.callbacks.sweep import inference
from malleable.datamodules.batch import AnswerBatch
from malleable.datamodules.files.escape import for_markdown
from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows
from malleable.lightning_modules.language.language_model import LanguageModel

CURVES = ("hr_10", "ndcg_10", "div_ratio_10", "or_ratio_10", "mgu_10", "dgu_10")


def recommendation_counts(items: Tensor, sample_id: Tensor, num_items: int) -> Tensor:
    """Count how often each item was recommended, ``(N,)``, on rows that are no padding."""
    kept = items[sample_id >= 0]
    return torch.bincount(kept[kept >= 0], minlength=num_items)


def measure(trainer: Trainer, module: LanguageModel, loader: Any) -> dict[str, Any]:
    """Evaluate a recommender outside the test loop.

    Args:
        trainer: Moves batches and adds up over ranks.
        module: Has ``configure_metrics`` and ``evaluate``.
        loader: Batches to evaluate on, this rank's share.

    Returns:
        ``figures`` by metric, ``counts`` of recommendations, ``(N,)`` on the CPU, and the ``protocol`` of :func:`protocol`.
    """
    metrics = {name: metric.to(module.device) for name, metric in module.configure_metrics().items()}
    assert module.catalog is not None
    counts = torch.zeros(len(module.catalog), dtype=torch.long, device=module.device)
    rows = torch.zeros(2, dtype=torch.long, device=module.device)
    with inference(trainer, module):
        for batch in loader:
            moved = trainer.strategy.batch_to_device(batch)
            found = module.evaluate(moved, metrics)
            assert found is not None
            counts += recommendation_counts(found.item_ids, moved.sample_id, len(counts))
            rows += batch_digest(moved)
    figures = {key: float(value) for metric in metrics.values() for key, value in metric.compute().items()}
    counts, rows = (trainer.strategy.reduce(total, reduce_op="sum").cpu() for total in (counts, rows))
    return {"figures": figures, "counts": counts, "protocol": protocol(module, rows)}


def batch_digest(batch: AnswerBatch) -> Tensor:
    """Digest of what is asked in the rows of a batch, to be added up over batches and ranks, ``(2,)``."""
    return hash_rows(batch.sample_id, [batch.target[:, None], batch.history, batch.metric_history, batch.seen, batch.candidates])


def protocol(module: LanguageModel, rows: Tensor) -> dict[str, str]:
    """Return all that figures depend on besides the model; figures of different protocols must not be compared.

    Args:
        module: Has ``configure_metrics``, and ``decoding`` if it decodes.
        rows: Sum of :func:`batch_digest` over all rows.
    """
    catalog, decoding = module.catalog, getattr(module, "decoding", None)
    assert catalog is not None
    count, total = rows.tolist()
    items = hashlib.sha256(json.dumps([catalog.titles, catalog.genres, catalog.popularity]).encode()).hexdigest()[:12]
    search: dict[str, Any] = {}  # of a module that decodes; counting baselines do not
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
    """Say in what two protocols differ; empty if they are equal."""
    if stored is None:
        return "an earlier version stored them without what they were measured on"
    return "; ".join(f"{name}: {stored.get(name)} then, {value} in this test" for name, value in tested.items() if stored.get(name) != value)


def self_play_sections(
    history: Sequence[dict[str, Any]],
    before: dict[str, Any],
    after: Tensor | None,
    titles: Sequence[str],
    difference: str = "",
    keys: Sequence[str] = (),
) -> list[Section]:
    """Make the parts of a report that self-play contributes.

    Args:
        history: For each finished phase and each round's answers, what was logged.
        before: What :func:`measure` found when self-play began; may be empty.
        after: Counts of recommendations of the tested model.
        titles: Titles of the items.
        difference: In what the test differs from the protocol of ``before``, which is then not shown.
        keys: Ids of the items, if they have any.
    """
    sections = []
    played = [entry for entry in history if entry["phase"] == "play"]
    if played:
        names = [name for name in played[0] if name not in ("phase", "round")]
        rows = [[entry["round"], *(entry[name] for name in names)] for entry in played]
        text = "What was rejected: `frac_identical` of the answers were the true title, `distinct_negs` of all were different ones."
        sections.append(Section("Rejected answers", text, table=(["round", *names], rows)))
    compared = [entry for entry in history if entry["phase"] == "decoding"]
    if compared:
        names = [name for name in compared[0] if name not in ("phase", "round", "titles")]
        rows = [[entry["round"], entry["titles"], *(entry[name] for name in names)] for entry in compared]
        text = (
            "What the model answered before each round, greedy and sampled, beside the true titles of the same rows. Self-play on sampled answers "
            "changes little where they are spread like the true ones; greedy answers are more concentrated."
        )
        sections.append(Section("Greedy and sampled answers", text, table=(["round", "titles", *names], rows)))
    curves = round_curves(history)
    if curves:
        size = (11.0, 3.0 * -(-len(curves) // 3))
        text = "Validation at the ends of the warm-up (0) and of each round; half a round is the end of its supervised phase."
        sections.append(Section("Rounds", text, figure=lambda figure: _draw_rounds(figure, curves), figure_size=size))
    if difference:
        text = f"The figures of the model before self-play are not shown beside this test: {for_markdown(difference)}."
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
        history: For each finished phase, what was logged.

    Returns:
        Abscissas and ordinates: 0 is the end of the warm-up, n the end of round n, n - 1/2 the end of its supervised phase where another follows.
    """
    paired = any(entry["phase"] == "dpo" for entry in history)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in CURVES:
        measured = [entry for entry in history if f"val_{name}" in entry]
        if len(measured) > 1:
            places = [entry["round"] - (0.5 if paired and entry["phase"] == "sft" else 0) for entry in measured]
            curves[name] = (places, [entry[f"val_{name}"] for entry in measured])
    return curves


def _draw_rounds(figure: Any, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    columns = min(3, len(curves))
    places = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flatten()
    for place, (name, points) in zip(places, curves.items(), strict=False):
        draw_curves(place, {name: points}, title=name, x_label="round")
        place.xaxis.get_major_locator().set_params(integer=True)
    for place in places[len(curves) :]:
        place.set_visible(False)
