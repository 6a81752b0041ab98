"""Export and analysis of the embeddings of a knowledge graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef

from malleable.callbacks.report.page import Section
from malleable.callbacks.report.plots import draw_uncertainty
from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.files.escape import for_markdown
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics

MEDIAN = "The median (minimum to maximum) of the mean standard deviation of entities is"
CLEAR = 1.0  # patterns with a smaller difference are shown
PATTERNS = {"symmetric": "{}", "inverse": "{} ↔ {}", "composed": "{}, then {} ≈ {}"}


@runtime_checkable
class GraphEmbedding(Protocol):
    """Protocol for modules with embeddings of a knowledge graph."""

    graph: KnowledgeGraph | None

    def uncertainty(self) -> Tensor:
        """Return the mean standard deviation of each entity, ``(E,)``.

        Raises:
            ValueError: If the model has no uncertainty. The message contains the reason.
        """

    def relation_patterns(self, k: int, among: Sequence[int] | None) -> Sequence[tuple[str, tuple[str, ...], float]]:
        """Return the k patterns with the smallest difference of each kind; a pattern is a tuple of kind, relations and difference.

        Args:
            k: Number of patterns of each kind.
            among: Relations to compare; ``None`` for all.

        Raises:
            NotImplementedError: If patterns are not defined for the model. The message contains the reason.
        """

    def metrics(self, split: Any) -> dict[str, Metric]:
        """Return the metrics of a split."""

    def export(self, folder: str | Path) -> Path:
        """Write the embeddings and their labels. Called on rank zero only."""


class EmbeddingReport(Callback):
    """Export the embeddings of a knowledge graph after training, and add their analysis to the report.

    The report shows the uncertainty of entities against their degree, and the clearest patterns of relations. After a test, it also shows the metrics
    of the relations with the best and the worst predictions. Modules that do not implement :class:`GraphEmbedding` are ignored. If a checkpoint is
    tested after training, its embeddings replace the exported ones.

    Args:
        dirpath: Folder of the exported embeddings; default: ``embeddings`` in the run folder.
        k: Maximum number of patterns of each kind, and of best and of worst relations.
        max_relations: Number of relations, the most frequent ones, among which patterns are searched. The time is cubic in this number.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, dirpath: str | None = None, k: int = 10, max_relations: int = 256) -> None:
        for name, value in (("k", k), ("max_relations", max_relations)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.dirpath = dirpath
        self.k = k
        self.max_relations = max_relations
        self.folder: Path | None = None
        self._trained = False
        self._sections: list[Section] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder, which is the same on all ranks."""
        self.folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "embeddings")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export and analyse the embeddings."""
        self._trained = True
        self._analyse(trainer, pl_module, tested=False)
        if self.report_sections():
            rank_zero_info(f"wrote the embeddings to {self.folder}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Analyse the tested embeddings, and export them if they come from this fit."""
        self._analyse(trainer, pl_module, tested=True)

    def report_sections(self) -> list[Section]:
        """Return the sections of the last fit or test."""
        return self._sections

    def _analyse(self, trainer: Trainer, module: LightningModule, tested: bool) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or not isinstance(module, GraphEmbedding) or module.graph is None:  # type: ignore[attr-defined]
            return
        assert self.folder is not None
        if self._trained and (not tested or trainer.ckpt_path):
            module.export(self.folder)
        self._sections = [uncertainty_section(module, module.graph), patterns_section(module, module.graph, self.k, self.max_relations)]
        metrics = [metric for metric in module.metrics("test").values() if isinstance(metric, LinkPredictionMetrics)] if tested else []
        self._sections += [relations_section(metric, module.graph, self.k) for metric in metrics]


def uncertainty_section(module: GraphEmbedding, graph: KnowledgeGraph) -> Section:
    """Return a section with the uncertainty of entities against the number of their training triples."""
    title = "Uncertainty of entities"
    try:
        uncertainty = module.uncertainty().cpu()
    except ValueError as error:
        return Section(title, f"{error}.")
    if not graph.degree:
        return Section(title, f"{MEDIAN} {_median_and_range(uncertainty)}. The numbers of training triples of the entities are unknown.")
    degree = torch.tensor(graph.degree)
    seen = degree > 0
    text = f"{MEDIAN} {_median_and_range(uncertainty[seen])} over the {int(seen.sum()):,} entities of the training triples"
    if not seen.all():
        text += f"; {_median_and_range(uncertainty[~seen])} over the {int((~seen).sum()):,} that occur only in validation or test (not in the figure)"
    correlation = float(spearman_corrcoef(uncertainty[seen].double(), degree[seen].double()))
    text += f". Its rank correlation (Spearman) with the number of an entity's training triples is {correlation:+.2f}."
    return Section(title, text, figure=lambda figure: draw_uncertainty(figure.subplots(), degree[seen], uncertainty[seen], correlation))


def patterns_section(module: GraphEmbedding, graph: KnowledgeGraph, k: int, max_relations: int) -> Section:
    """Return a section with the clearest patterns of relations."""
    title, count = "Patterns of relations", len(graph.relations)
    chosen = list(range(count))
    text = (
        "Patterns in the transformations of entities by relations. A difference of 0 is an exact pattern, a difference of 2 is no similarity. "
        f"Differences below {CLEAR:g} are listed."
    )
    if count > max_relations:
        frequency = torch.tensor(graph.frequency or [0] * count)
        chosen = frequency.argsort(descending=True, stable=True)[:max_relations].tolist()
        text += f" Only the {max_relations} most frequent of {count:,} relations are searched."
    try:
        patterns = module.relation_patterns(k, chosen)
    except NotImplementedError as error:
        return Section(title, f"{error}.")
    rows = [(PATTERNS[kind].format(*relations), kind, difference) for kind, relations, difference in patterns]
    clear = [row for row in rows if row[2] < CLEAR]
    if not clear:
        lowest = sorted(rows, key=lambda row: row[2])[:1]
        nearest = "".join(f"; the clearest pattern is {for_markdown(name)} ({kind}, {value:.2f})" for name, kind, value in lowest)
        return Section(title, f"{text} No difference is below {CLEAR:g}{nearest}.")
    return Section(title, text, (("relations", "pattern", "difference"), clear))


def relations_section(metric: LinkPredictionMetrics, graph: KnowledgeGraph, k: int) -> Section:
    """Return a section with the relations of the best and the worst MRR, with the metrics of both directions."""
    figures, count = metric.relation_figures, len(graph.relations)
    hits = [f"hits_{k}" for k in sorted({metric.ks[0], metric.ks[-1]})]
    names = ("queries", "mrr", *hits)
    sums = (figures["mrr"].nan_to_num() * figures["queries"]).view(2, count).sum(0)
    queries = figures["queries"].view(2, count).sum(0)
    tested = queries.nonzero()[:, 0]
    order = tested[(sums / queries)[tested].argsort(descending=True, stable=True)].tolist()
    columns = [figures[name][direction * count : (direction + 1) * count].tolist() for direction in range(2) for name in names]
    rows: list[list[Any]] = [[graph.relations[relation], *(column[relation] for column in columns)] for relation in order]
    if len(rows) > 2 * k:
        rows[k:-k] = [[f"… {len(rows) - 2 * k:,} more"] + [None] * len(columns)]
    header = ["relation", *(f"{name} ({direction})" for direction in ("tail", "head") for name in names)]
    text = (
        f"{len(order):,} of {count:,} relations are tested. They are sorted by the MRR of both directions: prediction of tails (h, r, ?) and of "
        "heads (?, r, t)."
    )
    return Section("Figures of relations", text, (header, rows))


def _median_and_range(values: Tensor) -> str:
    return f"{values.median():.3g} ({values.min():.3g} to {values.max():.3g})"
