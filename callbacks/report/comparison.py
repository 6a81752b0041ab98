"""Comparison of a recommender before and after self-play, for the report.

Shapes: N items of the catalogue.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from malleable.callbacks.report.metric_notes import differing_inputs
from malleable.callbacks.report.page import Column, Section
from malleable.callbacks.report.plots import draw_exposure, draw_exposure_curve
from malleable.callbacks.report.round_curves import draw_rounds, round_curves
from malleable.callbacks.report.row_recorder import metric_inputs
from malleable.callbacks.row_pass import inference_mode
from malleable.datamodules.batch import AnswerBatch, Recommendations
from malleable.datamodules.files.escape import for_markdown
from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows
from malleable.lightning_modules.language.language_model import LanguageModel


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
        :func:`evaluation_protocol`. ``inputs``: output of :func:`~malleable.callbacks.report.row_recorder.metric_inputs`.
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
    return {"figures": figures, "counts": counts, "protocol": evaluation_protocol(module, rows), "inputs": metric_inputs(metrics)}


def hash_batch(batch: AnswerBatch) -> Tensor:
    """Compute number and hash of the rows of a batch, ``(2,)``, to be summed over batches and ranks."""
    return hash_rows(batch.sample_id, [batch.target[:, None], batch.history, batch.metric_history, batch.seen, batch.candidates])


def evaluation_protocol(module: LanguageModel, rows: Tensor) -> dict[str, str]:
    """Describe test rows, items, metrics and decoding as texts, by name. Metrics of different protocols must not be compared.

    Genres and popularity are not included, because only some metrics depend on them.

    Args:
        module: Module with the method ``configure_metrics``, and the attribute ``decoding`` if it decodes.
        rows: Sum of :func:`hash_batch` over all rows.
    """
    catalog, decoding = module.catalog, getattr(module, "decoding", None)
    assert catalog is not None
    count, total = rows.tolist()
    items = hashlib.sha256(json.dumps(catalog.titles).encode()).hexdigest()[:12]
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
        "items": f"{len(catalog)} items ({items})",
        "metrics": json.dumps(metrics, sort_keys=True),
        "decoding": json.dumps(search, sort_keys=True),
    }


def protocol_difference(stored: Mapping[str, str] | None, tested: Mapping[str, str]) -> str:
    """Return a text with the differences of two protocols; empty if they are equal."""
    if stored is None:
        return "an earlier version stored them without the evaluation protocol"
    return "; ".join(f"{name}: {stored.get(name)} before, {value} in this test" for name, value in tested.items() if stored.get(name) != value)


class SelfPlayComparison:
    """Comparison of the tested model with the model before self-play.

    Attributes:
        counts: Number of recommendations of each item by the tested model, ``(N,)``; ``None`` without a test.
        titles: Titles of the items.
        keys: Ids of the items; empty if they have none.
        difference: Differences between the protocols before self-play and in the test. If it is not empty, the models are not compared.
        inputs: What the metrics of the test were computed with, such as genres; ``None`` without a test.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.titles: tuple[str, ...] = ()
        self.keys: tuple[str, ...] = ()
        self.difference = ""
        self.inputs: dict[str, dict[str, str]] | None = None
        self._rows: Tensor | None = None

    def start(self, module: LanguageModel) -> None:
        """Reset the counts. All ranks must call this method, including those without test rows."""
        self.counts = torch.zeros(len(module.catalog or ()), dtype=torch.long, device=module.device)
        self._rows = torch.zeros(2, dtype=torch.long, device=module.device)

    def count(self, outputs: Any, batch: Any) -> None:
        """Count the recommendations for a batch."""
        if isinstance(outputs, Recommendations) and self.counts is not None and self._rows is not None:
            self.counts = self.counts + recommendation_counts(outputs.item_ids, batch.sample_id, len(self.counts))
            self._rows = self._rows + hash_batch(batch)

    def finish(self, trainer: Trainer, module: LanguageModel, before: Mapping[str, Any]) -> None:
        """Sum the counts over all ranks, and compare the protocol with that of the model before self-play.

        Args:
            trainer: Trainer, for sums over ranks.
            module: Tested module.
            before: Output of :func:`evaluate_recommender` before self-play.
        """
        if self.counts is None or self._rows is None:
            return
        assert module.catalog is not None
        self.titles, self.keys = module.catalog.titles, module.catalog.keys
        self.counts, rows = (trainer.strategy.reduce(total, reduce_op="sum").cpu() for total in (self.counts, self._rows))
        self.difference = protocol_difference(before.get("protocol"), evaluation_protocol(module, rows))
        self.inputs = metric_inputs(module.metrics("test"))

    def columns(self, history: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> list[Column]:
        """Return the comparable metrics of the model before self-play.

        Args:
            history: Logged values of each finished phase.
            before: Output of :func:`evaluate_recommender` before self-play; may be empty.
        """
        if not before or self.difference or not _has_rounds(history):
            return []
        excluded = self._incomparable(before)
        return [Column("supervised only", "before", {name: value for name, value in before["figures"].items() if name not in excluded})]

    def sections(self, history: Sequence[dict[str, Any]], before: Mapping[str, Any]) -> list[Section]:
        """Return the sections of self-play: statistics and curves of the rounds, and the recommendations before and after self-play.

        Args:
            history: As in :meth:`columns`.
            before: As in :meth:`columns`.
        """
        played = before if _has_rounds(history) else {}
        sections = self_play_sections(history, played, self.counts, self.titles, self.difference if played else "", self.keys)
        if played and self.counts is not None and not self.difference and (excluded := self._incomparable(before)):
            reasons = "; ".join(dict.fromkeys(excluded.values()))
            text = f"{', '.join(excluded)} of the model before self-play are not shown, because they were computed with other inputs: {reasons}."
            sections.append(Section("Supervised model", for_markdown(text)))
        return sections

    def _incomparable(self, before: Mapping[str, Any]) -> dict[str, str]:
        """Return the metrics that were computed with other inputs before self-play, with the differences."""
        if self.inputs is None:
            return {}
        found = {name: differing_inputs(name, before.get("inputs", {}), self.inputs) for name in before["figures"]}
        return {name: text for name, text in found.items() if text}


def _has_rounds(history: Sequence[Mapping[str, Any]]) -> bool:
    return any(entry["round"] for entry in history)


def self_play_sections(
    history: Sequence[dict[str, Any]],
    before: Mapping[str, Any],
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
    if curves := round_curves(history):
        size = (11.0, 3.0 * -(-len(curves) // 3))
        text = (
            "Validation metrics at the end of the warm-up (0) and of each round. A half-integer is the end of a supervised phase. Bars are 95 % "
            "intervals over the validation rows. Metrics without bars are not means over rows, and their axes begin at 0."
        )
        sections.append(Section("Rounds", text, figure=lambda figure: draw_rounds(figure, curves), figure_size=size))
    if difference:
        text = f"The metrics of the model before self-play are not shown, because they cannot be compared with this test: {for_markdown(difference)}."
        sections.append(Section("Supervised model", text))
    elif before and after is not None:
        versions = {"before self-play": before["counts"], "after": after}
        sections.append(Section("Exposure", figure=lambda figure: draw_exposure_curve(figure.subplots(), versions)))
        bars = partial(draw_exposure, versions=versions, titles=titles, keys=keys)
        sections.append(Section("Most recommended titles", figure=lambda figure: bars(figure.subplots()), figure_size=(8.0, 5.5)))
    return sections
