"""Counting baselines: recommenders without gradients, with the same ``fit``, ``test`` and ``predict`` as all modules.

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
from torchmetrics.utilities.distributed import gather_all_tensors

from malleable.datamodules.batch import AnswerBatch, Catalog, RankedRows, Recommendations
from malleable.datamodules.collate import collate_answers
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.distributed_rows import mark_padding_rows
from malleable.lightning_modules.functional.recommendation.baselines import (
    cosine_similarity,
    count_items,
    count_pairs,
    neighbour_scores,
    top_items,
    transition_scores,
)
from malleable.lightning_modules.metrics.ranking import check_ks
from malleable.lightning_modules.recommendation.counted_rows import answer_rows, counted_columns, items_only, training_rows
from malleable.lightning_modules.recommendation.evaluation import ItemRanking, allowed_items

log = logging.getLogger(__name__)

MAX_TABLE_ITEMS = 30_000  # a table of items x items then needs 3.6 GB
CHUNK = 1024  # number of rows read at once


class Baseline(ItemRanking, BaseModule):
    """Base class of recommenders that only count interactions.

    ``fit``, and ``test``, ``validate`` and ``predict`` without a checkpoint, count all training rows of the data module before the first batch.
    If the data module does not give access to its rows, or with ``limit_train_batches``, ``fit`` counts the batches of the first epoch. Every process
    counts the rows of all processes, so that its tables are always complete. The tables are buffers, which are saved in checkpoints.

    Args:
        catalog: The items. Default: taken from the data module.
        exclude_seen: Do not recommend items that the user has interacted with.
        ks: Cut-offs of the ranking metrics.
    """

    trains: ClassVar[bool] = False
    new_items: ClassVar[str] = "their counts are 0"
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
        # Without a parameter and an optimizer, the Trainer would count no steps and save no checkpoint, and DDP would raise an error.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.register_buffer("num_rows", torch.tensor(0))

    @abstractmethod
    def scores(self, batch: RankedRows) -> Tensor:
        """Score every item for every row, ``(B, N)``."""

    def configure_model(self) -> None:
        """Create empty tables; a second call does nothing."""
        if self.catalog is not None and not hasattr(self, "counts"):
            self._make_tables(len(self.catalog))
            self.reset()

    def reset(self) -> None:
        """Reset all counts; the popularity of the catalogue remains."""
        for name in (*self.tables, "counts", "num_rows"):
            getattr(self, name).zero_()
        if self.catalog is not None and self.catalog.popularity:
            self.counts += torch.tensor(self.catalog.popularity, dtype=self.counts.dtype, device=self.counts.device)

    def count(self, target: Tensor, seen: Tensor, last: Tensor) -> None:
        """Add rows to the tables.

        Args:
            target: ``(B,)`` next item; -1 in padding rows.
            seen: ``(B, S)`` items of the user before the target, padded with -1.
            last: ``(B,)`` item directly before the target, -1 if there is none.
        """
        self.num_rows += (target >= 0).sum()
        if self.catalog is None or not self.catalog.popularity:
            count_items(self.counts, target)
            # The first item of a user is never a target; it is the only seen item in the user's first row.
            first = (seen >= 0).sum(1, keepdim=True) == 1
            count_items(self.counts, seen.masked_fill(~first | (target < 0)[:, None], -1))

    def supports(self, num_items: int) -> bool:
        """Return whether the tables of a catalogue are small enough."""
        return not self.tables or num_items <= MAX_TABLE_ITEMS

    def check_size(self, num_items: int) -> None:
        """Check that the tables of a catalogue are small enough.

        Raises:
            MisconfigurationException: If a table of items x items would have more than 30,000 items.
        """
        if not self.supports(num_items):
            raise MisconfigurationException(
                f"{type(self).__name__} stores a table of items x items and supports at most {MAX_TABLE_ITEMS} items, got {num_items}; "
                "use Popularity, or filter rare items (min_item_events)"
            )

    def compute_loss(self, batch: RankedRows) -> LossOutput:
        """Return a loss of zero, which depends on a parameter."""
        return LossOutput(self.anchor * 0.0, {})

    def training_step(self, batch: RankedRows, batch_idx: int) -> Tensor:
        """Count the batches of the first epoch, over all processes, unless all rows were counted at the start."""
        if self.current_epoch == 0 and self._rows() is None:
            if not isinstance(batch, AnswerBatch):
                raise MisconfigurationException(
                    f"{type(self).__name__} counts rows of a history and a target, got {type(batch).__name__}: train_view must be 'answer'"
                )
            batch.sample_id = mark_padding_rows(batch.sample_id, self.attached, "train", batch_idx)
            for rows in zip(*(self._of_all_processes(part) for part in counted_columns(batch)), strict=True):
                self.count(*rows)
        return self.compute_loss(batch).loss

    def log_loss(self, batch: RankedRows, split: Split) -> None:
        """Do nothing: there is no loss."""

    def on_train_start(self) -> None:
        """Reset the counts and count the rows of the data module, unless a run is resumed."""
        if self.global_step == 0:
            self.reset()
            if (rows := self._rows()) is not None:
                count_rows([self], rows)

    def on_train_epoch_end(self) -> None:
        """Stop after one epoch."""
        self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer with learning rate 0."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def on_validation_start(self) -> None:
        """Count the training rows, unless the counts come from a checkpoint."""
        if not self.trainer.training and not self.trainer.sanity_checking:
            self._ensure_counted()

    def on_test_start(self) -> None:
        """Count the training rows, unless the counts come from a checkpoint."""
        self._ensure_counted()

    def on_predict_start(self) -> None:
        """Count the training rows, unless the counts come from a checkpoint."""
        self._ensure_counted()

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has created the tables."""
        return hasattr(self, "counts")

    @needs_weights
    @torch.no_grad()
    def recommend(self, batch: RankedRows, k: int | None = None) -> Recommendations:
        """Find the k best items of each row.

        Args:
            batch: Rows; seen items are excluded with ``exclude_seen``, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        scores = self.scores(batch)
        return Recommendations(*top_items(scores, k or max(self.ks), allowed_items(batch, scores.shape[1], self.exclude_seen)))

    def predict_step(self, batch: RankedRows, batch_idx: int) -> Recommendations:
        """Recommend items."""
        return self.recommend(batch)

    def setup(self, stage: str) -> None:
        """Copy the catalogue from the data module, and extend the tables if it has new items.

        Raises:
            MisconfigurationException: If ``fit`` runs with DeepSpeed.
        """
        super().setup(stage)
        if stage == "fit" and getattr(self.trainer.strategy, "handles_gradient_accumulation", False):
            raise MisconfigurationException(
                f"{type(self).__name__} has no weights that can be sharded: it cannot run `fit` with {type(self.trainer.strategy).__name__}; "
                "use one device or ddp (--config base/ddp.yaml)"
            )
        if self.catalog is not None and hasattr(self, "counts"):
            for name in (*self.tables, "counts"):
                setattr(self, name, _pad_table(getattr(self, name), len(self.catalog)))

    def settings(self) -> dict[str, Any]:
        """Return the class, and the options that affect scores."""
        return {"class": type(self).__name__, **super().settings()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create tables for the catalogue, which may have more items than the stored one."""
        state = checkpoint["state_dict"]
        if self.catalog is None and "catalog" not in checkpoint:
            log.warning("the checkpoint was written by an earlier version, without its items: they are not compared with the items of the data")
            size = len(state["counts"])
        else:
            super().on_load_checkpoint(checkpoint)
            assert self.catalog is not None
            size = len(self.catalog)
        self.check_settings(checkpoint)
        if not hasattr(self, "counts"):
            self._make_tables(size)
        checkpoint["state_dict"] = state | {name: _pad_table(state[name], size) for name in (*self.tables, "counts") if name in state}

    def _make_tables(self, num_items: int) -> None:
        self.check_size(num_items)
        # Integers, because a Trainer of lower precision would round floats.
        self.register_buffer("counts", torch.zeros(num_items, dtype=torch.int32, device=self.device))
        for name in self.tables:
            self.register_buffer(name, torch.zeros(num_items, num_items, dtype=torch.int32, device=self.device))

    def _rows(self) -> Any:
        """Return the training rows if all of them are counted at once, else ``None``; batches would omit rows that do not fill a global batch."""
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
                f"{type(self).__name__} has not counted any rows: call `fit` first, give a checkpoint, or pass a data module with training rows"
            )
        count_rows([self], training_rows(source))


class Popularity(Baseline):
    """Recommend the items with the most training interactions."""

    def __init__(self, catalog: Catalog | None = None, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)) -> None:
        super().__init__(catalog, exclude_seen, ks)
        self.save_hyperparameters(ignore="catalog")

    def scores(self, batch: RankedRows) -> Tensor:
        """Score items by their number of interactions, ``(B, N)``, equal in all rows."""
        return self.counts.expand(len(batch), -1)


class ItemKNN(Baseline):
    """Recommend items that have users in common with the last items of the history.

    score(i) = sum over the last items j of ``|users(i) & users(j)| / sqrt(|users(i)| |users(j)|)``

    Args:
        catalog: The items. Default: taken from the data module.
        last: Number of last items of the history that are used.
        exclude_seen: Do not recommend items that the user has interacted with.
        ks: Cut-offs of the ranking metrics.

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
        """Count pairs of items of a user; each pair is counted once, when its later item is the target."""
        super().count(target, seen, last)
        count_pairs(self.pairs, seen, target[:, None])

    def scores(self, batch: RankedRows) -> Tensor:
        """Score items by their similarity to the last items of the history, ``(B, N)``."""
        return neighbour_scores(self.similarity, batch.history, self.last)

    @property
    def similarity(self) -> Tensor:
        """Similarity of items from the current counts, ``(N, N)``."""
        rows = int(self.num_rows)
        if self._similarity is None or self._similarity[0] != rows or self._similarity[1].device != self.pairs.device:
            self._similarity = (rows, self.compare_items())
        return self._similarity[1]

    def compare_items(self) -> Tensor:
        """Compute the cosine similarity of items, ``(N, N)``."""
        return cosine_similarity(self.pairs, self.counts)


class Markov(ItemKNN):
    """Recommend items that often follow the last item, smoothed by item similarity.

    score(i) = ``#(last -> i) + smoothing *`` score of :class:`ItemKNN`

    Args:
        catalog: The items. Default: taken from the data module.
        last: Number of last items of the history that the similarity uses.
        smoothing: Weight of the similarity relative to one transition, >= 0.
        exclude_seen: Do not recommend items that the user has interacted with.
        ks: Cut-offs of the ranking metrics.

    Source:
        First-order Markov chain over items, as in Rendle et al. (2010), Factorizing personalized Markov chains, section 4.
        Differs: counts smoothed by item similarity instead of a factorisation.
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
        """Count pairs of items of a user, and transitions."""
        super().count(target, seen, last)
        count_pairs(self.transitions, last, target)

    def scores(self, batch: RankedRows) -> Tensor:
        """Score items by transitions from the last item plus weighted similarity, ``(B, N)``."""
        return transition_scores(self.transitions, batch.history) + self.smoothing * super().scores(batch)


def count_rows(modules: Sequence[Baseline], rows: Any) -> None:
    """Count all rows in all modules, with one pass over the rows; every process counts all rows.

    Args:
        modules: Modules with a catalogue.
        rows: Map-style dataset of examples, such as :func:`training_rows`.
    """
    for module in modules:
        module.configure_model()
        module.reset()
    for start in range(0, len(rows), CHUNK):
        batch = collate_answers([items_only(rows[index]) for index in range(start, min(start + CHUNK, len(rows)))])
        for module in modules:
            module.count(*counted_columns(batch.to(module.device)))


def _pad_table(table: Tensor, size: int) -> Tensor:
    """Pad a table of items with zeros for new items in every dimension."""
    more = size - len(table)
    return nn.functional.pad(table, (0, more) * table.dim()) if more > 0 else table
