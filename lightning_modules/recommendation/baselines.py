"""Counting baselines: recommenders without gradients, with the same ``fit``, ``test`` and ``predict`` as all others.

Shapes: B rows, L history items, S seen items, N items.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from malleable.datamodules.batch import AnswerBatch, Catalog, Recommendations
from malleable.datamodules.collate import collate_answers
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.functional.recommendation.baselines import (
    cosine_similarity,
    count_items,
    count_pairs,
    neighbour_scores,
    top_items,
    transition_scores,
)
from malleable.lightning_modules.metrics.ranking import check_ks
from malleable.lightning_modules.recommendation.counted_rows import answer_rows, counted, items_only, training_rows
from malleable.lightning_modules.recommendation.evaluation import (
    allowed_items,
    recommendation_headline,
    recommendation_metrics,
    update_metrics,
)

log = logging.getLogger(__name__)

MAX_TABLE_ITEMS = 30_000  # a table of items by items then takes 3.6 GB
CHUNK = 1024  # rows read at a time


class Baseline(BaseModule):
    """A recommender whose training is one pass of counting.

    ``fit``, and ``test``, ``validate`` and ``predict`` without a checkpoint, count the data module's training rows, all of them, before the first
    batch. Without such a data module, or with ``limit_train_batches``, ``fit`` counts the batches of its first epoch. Every process counts
    the rows of all, so its tables are whole at any moment; they are buffers, so checkpoints carry them.

    Args:
        catalog: The items; taken from the data module when left out.
        exclude_seen: Leave out what the user already has.
        ks: Cut-offs of the metrics.
    """

    trains: ClassVar[bool] = False
    required_from_datamodule: ClassVar[tuple[str, ...]] = ("catalog",)
    reads_text: ClassVar[bool] = False
    weight_settings: ClassVar[tuple[str, ...]] = ("last", "smoothing")
    tables: ClassVar[tuple[str, ...]] = ()
    """Names of the ``(N, N)`` count tables, besides ``counts``, ``(N,)``."""
    counts: Tensor
    num_rows: Tensor

    def __init__(self, catalog: Catalog | None = None, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)) -> None:
        super().__init__()
        self.catalog = catalog
        self.exclude_seen = exclude_seen
        self.ks = check_ks(ks)
        # Without a parameter and an optimizer the Trainer would count no steps, save nothing, and refuse DDP.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.register_buffer("num_rows", torch.tensor(0))

    @abstractmethod
    def scores(self, batch: AnswerBatch) -> Tensor:
        """Score every item for every row, ``(B, N)``."""

    def configure_model(self) -> None:
        """Make empty tables; a second call does nothing."""
        if self.catalog is not None and not hasattr(self, "counts"):
            self._make_tables(len(self.catalog))
            self.reset()

    def reset(self) -> None:
        """Forget what was counted; the catalogue's popularity stays."""
        for name in (*self.tables, "counts", "num_rows"):
            getattr(self, name).zero_()
        if self.catalog is not None and self.catalog.popularity:
            self.counts += torch.tensor(self.catalog.popularity, dtype=self.counts.dtype, device=self.counts.device)

    def count(self, target: Tensor, seen: Tensor, last: Tensor) -> None:
        """Add rows to the tables.

        Args:
            target: ``(B,)`` next item; -1 in rows that do not count.
            seen: ``(B, S)`` the user's items before it, padded with -1.
            last: ``(B,)`` the item just before it, -1 if there is none.
        """
        self.num_rows += (target >= 0).sum()
        if self.catalog is None or not self.catalog.popularity:
            count_items(self.counts, target)
            # A user's first item is the target of no row, and the only item seen in the user's first row.
            first = (seen >= 0).sum(1, keepdim=True) == 1
            count_items(self.counts, seen.masked_fill(~first | (target < 0)[:, None], -1))

    def compute_loss(self, batch: AnswerBatch) -> LossOutput:
        """Nothing is learnt by gradient: a zero that depends on a parameter."""
        return LossOutput(self.anchor * 0.0, {})

    def training_step(self, batch: AnswerBatch, batch_idx: int) -> Tensor:
        """Count the batches of the first epoch, over all processes, unless all rows were counted at the start."""
        if self.current_epoch == 0 and self._rows() is None:
            if not isinstance(batch, AnswerBatch):
                raise MisconfigurationException(
                    f"{type(self).__name__} counts rows of a history and a target, got {type(batch).__name__}: train_view must be 'answer'"
                )
            batch.sample_id = self._mark_repeats(batch, batch_idx, "train")
            for rows in zip(*(self._of_all_processes(part) for part in counted(batch)), strict=True):
                self.count(*rows)
        return self.compute_loss(batch).loss

    def log_loss(self, batch: AnswerBatch, split: Split) -> None:
        """There is no loss to log."""

    def on_train_start(self) -> None:
        """Start from nothing, unless a run is resumed, and count the rows of a data module."""
        if self.global_step == 0:
            self.reset()
            if (rows := self._rows()) is not None:
                learn([self], rows)

    def on_train_epoch_end(self) -> None:
        """One pass is all there is to count."""
        self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make an optimizer that changes nothing."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def on_validation_start(self) -> None:
        """Count first, where no checkpoint did."""
        if not self.trainer.training and not self.trainer.sanity_checking:
            self._ensure_counted()

    def on_test_start(self) -> None:
        """Count first, where no checkpoint did."""
        self._ensure_counted()

    def on_predict_start(self) -> None:
        """Count first, where no checkpoint did."""
        self._ensure_counted()

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has made the tables."""
        return hasattr(self, "counts")

    @needs_weights
    @torch.no_grad()
    def recommend(self, batch: AnswerBatch, k: int | None = None) -> Recommendations:
        """Find the k best items of each row.

        Args:
            batch: Rows; what they have seen is left out if so decided, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        scores = self.scores(batch)
        return Recommendations(*top_items(scores, k or max(self.ks), allowed_items(batch, scores.shape[1], self.exclude_seen)))

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Main metrics of recommended lists."""
        return recommendation_headline(self.ks)

    def configure_metrics(self) -> dict[str, Metric]:
        """Accuracy and exposure of the recommended lists."""
        assert self.catalog is not None
        return recommendation_metrics(self.catalog, self.ks)

    def evaluate(self, batch: AnswerBatch, metrics: dict[str, Metric]) -> Recommendations:
        """Recommend, and compare with the true item."""
        recommended = self.recommend(batch)
        update_metrics(metrics, recommended, batch)
        return recommended

    def predict_step(self, batch: AnswerBatch, batch_idx: int) -> Recommendations:
        """Recommend."""
        return self.recommend(batch)

    def setup(self, stage: str) -> None:
        """Take the catalogue; an extended one makes room in the tables for its new items.

        Raises:
            MisconfigurationException: If DeepSpeed is to fit what has no weights.
        """
        super().setup(stage)
        if stage == "fit" and getattr(self.trainer.strategy, "handles_gradient_accumulation", False):
            raise MisconfigurationException(
                f"{type(self).__name__} counts and has no weights to shard: it cannot run `fit` with {type(self.trainer.strategy).__name__}; "
                "use one device or ddp (--config base/ddp.yaml)"
            )
        if self.catalog is not None and hasattr(self, "counts"):
            for name in (*self.tables, "counts"):
                setattr(self, name, _grown(getattr(self, name), len(self.catalog)))

    def settings(self) -> dict[str, Any]:
        """Return the options of the scores, and the class."""
        return {"class": type(self).__name__, **super().settings()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make tables of the size of the catalogue, which may be longer than the stored one."""
        state = checkpoint["state_dict"]
        if self.catalog is None and "catalog" not in checkpoint:
            log.warning("the checkpoint is of an earlier version: it does not store its items, which cannot be compared with those of the data")
            size = len(state["counts"])
        else:
            super().on_load_checkpoint(checkpoint)
            assert self.catalog is not None
            size = len(self.catalog)
        self.check_settings(checkpoint)
        if not hasattr(self, "counts"):
            self._make_tables(size)
        checkpoint["state_dict"] = state | {name: _grown(state[name], size) for name in (*self.tables, "counts") if name in state}

    def _make_tables(self, num_items: int) -> None:
        if self.tables and num_items > MAX_TABLE_ITEMS:
            raise MisconfigurationException(
                f"{type(self).__name__} keeps a table of items by items and takes at most {MAX_TABLE_ITEMS} items, got {num_items}; "
                "use Popularity, or drop rare items (min_item_events)"
            )
        # Integers: a Trainer of lower precision would round floats.
        self.register_buffer("counts", torch.zeros(num_items, dtype=torch.int32, device=self.device))
        for name in self.tables:
            self.register_buffer(name, torch.zeros(num_items, num_items, dtype=torch.int32, device=self.device))

    def _rows(self) -> Any:
        """Return the training rows where all of them are to be counted: batches leave out those that fill no global batch."""
        trainer: Any = self.attached
        whole = trainer is not None and isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1.0
        return answer_rows(trainer.datamodule) if whole else None

    def _of_all_processes(self, rows: Tensor) -> list[Tensor]:
        return [rows] if self.trainer.world_size == 1 else gather_all_tensors(rows)

    def _ensure_counted(self) -> None:
        if self.num_rows:
            return
        source = getattr(self.trainer, "datamodule", None)
        if source is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has counted nothing: call `fit` first, give a checkpoint, or pass a data module to count"
            )
        learn([self], training_rows(source))


class Popularity(Baseline):
    """Recommend the items with the most training interactions."""

    def __init__(self, catalog: Catalog | None = None, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)) -> None:
        super().__init__(catalog, exclude_seen, ks)
        self.save_hyperparameters(ignore="catalog")

    def scores(self, batch: AnswerBatch) -> Tensor:
        """Score items by their interactions, alike in every row."""
        return self.counts.expand(len(batch), -1)


class ItemKNN(Baseline):
    """Recommend items whose users are those of the last items.

    score(i) = sum over the last items j of ``|users(i) & users(j)| / sqrt(|users(i)| |users(j)|)``

    Args:
        catalog: The items; taken from the data module when left out.
        last: Items of the history that count.
        exclude_seen: Leave out what the user already has.
        ks: Cut-offs of the metrics.

    Source:
        Sarwar et al. (2001), Item-based collaborative filtering recommendation algorithms, sections 3.1.1 and 3.2.
        Differs: implicit feedback, all neighbours, and only the last items of the history.
    """

    tables: ClassVar[tuple[str, ...]] = ("pairs",)
    pairs: Tensor

    def __init__(self, catalog: Catalog | None = None, last: int = 10, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)) -> None:
        super().__init__(catalog, exclude_seen, ks)
        if last < 1:
            raise ValueError(f"last must be >= 1, got {last}")
        self.last = last
        self._similarity: tuple[int, Tensor] | None = None
        self.save_hyperparameters(ignore="catalog")

    def count(self, target: Tensor, seen: Tensor, last: Tensor) -> None:
        """Count who has what together: each pair is met once, when its later item is the target."""
        super().count(target, seen, last)
        count_pairs(self.pairs, seen, target[:, None])

    def scores(self, batch: AnswerBatch) -> Tensor:
        """Score items by their similarity to the last of the history."""
        return neighbour_scores(self.similarity, batch.history, self.last)

    @property
    def similarity(self) -> Tensor:
        """Cosine similarity, ``(N, N)``, of what is counted by now."""
        rows = int(self.num_rows)
        if self._similarity is None or self._similarity[0] != rows or self._similarity[1].device != self.pairs.device:
            self._similarity = (rows, cosine_similarity(self.pairs, self.counts))
        return self._similarity[1]


class Markov(ItemKNN):
    """Recommend what came next after the last item, and similar items where that is not known.

    score(i) = ``#(last -> i) + smoothing * `` the score of :class:`ItemKNN`

    Args:
        catalog: The items; taken from the data module when left out.
        last: Items of the history that the similarity counts.
        smoothing: Weight of the similarity, in transitions, >= 0.
        exclude_seen: Leave out what the user already has.
        ks: Cut-offs of the metrics.

    Source:
        First-order Markov chain over items, as in Rendle et al. (2010), Factorizing personalized Markov chains, section 4.
        Differs: plain counts, smoothed by item similarity in place of a factorisation.
    """

    tables: ClassVar[tuple[str, ...]] = ("pairs", "transitions")
    transitions: Tensor

    def __init__(
        self, catalog: Catalog | None = None, last: int = 10, smoothing: float = 1.0, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)
    ) -> None:
        super().__init__(catalog, last, exclude_seen, ks)
        if smoothing < 0:
            raise ValueError(f"smoothing must be >= 0, got {smoothing}")
        self.smoothing = smoothing
        self.save_hyperparameters(ignore="catalog")

    def count(self, target: Tensor, seen: Tensor, last: Tensor) -> None:
        """Count also what follows what."""
        super().count(target, seen, last)
        count_pairs(self.transitions, last, target)

    def scores(self, batch: AnswerBatch) -> Tensor:
        """Score items by the transitions from the last item, then by similarity."""
        return transition_scores(self.transitions, batch.history) + self.smoothing * super().scores(batch)


def learn(modules: Sequence[Baseline], rows: Any) -> None:
    """Count all rows, read once for all modules; every process counts them all.

    Args:
        modules: What is to count; their catalogue must be known.
        rows: Map-style dataset of examples, such as :func:`training_rows`.
    """
    for module in modules:
        module.configure_model()
        module.reset()
    for start in range(0, len(rows), CHUNK):
        batch = collate_answers([items_only(rows[index]) for index in range(start, min(start + CHUNK, len(rows)))])
        for module in modules:
            module.count(*counted(batch.to(module.device)))


def _grown(table: Tensor, size: int) -> Tensor:
    """Pad a table of items with zeros for new items, along every dimension."""
    more = size - len(table)
    return nn.functional.pad(table, (0, more) * table.dim()) if more > 0 else table
