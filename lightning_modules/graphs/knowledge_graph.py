"""Base class of knowledge-graph embeddings."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from malleable.datamodules.batch import KnowledgeGraph, QueryBatch, Recommendations
from malleable.lightning_modules.base import BaseModule, LossOutput, Split
from malleable.lightning_modules.functional.graphs.interaction import Interaction, Vectors, score_all
from malleable.lightning_modules.functional.precision import full, full_precision
from malleable.lightning_modules.graphs.answers import GraphAnswers
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.losses.embedding import BCESum, EmbeddingLoss, Positives, Regulariser
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics, QueryEntities, check_scores
from malleable.lightning_modules.serialization import from_plain, object_from_plain

log = logging.getLogger(__name__)


class KnowledgeGraphModule(BaseModule, GraphAnswers):
    """Base class of knowledge-graph embeddings: embedding tables, and an interaction that scores triples ``(h, r, t)``.

    A relation and its reciprocal have separate rows, so that ``(?, r, t)`` is answered as ``(t, r + R, ?)``.

    Args:
        interaction: Score function.
        graph: Labels of entities and relations. Default: taken from the data module.
        dimension: Width D of each part of a row.
        gamma: Margin that is added to scores that are negative distances.
        gamma_trainable: Whether gamma is trained.
        loss: Training loss. Default: binary cross-entropy over all entities (:class:`BCESum`).
        regulariser: Penalty that is added to the loss.
        dropout: Dropout probability of the entries of heads and relations.
        init: Initialisation of the tables.
        tuning: Settings of the default optimizer and scheduler.
        ranking: Settings of evaluation and prediction.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, stepped after every optimizer step, instead of the default one.

    Raises:
        ValueError: If an argument is out of range.
    """

    required_from_datamodule: ClassVar[tuple[str, ...]] = ("graph",)
    weight_settings: ClassVar[tuple[str, ...]] = ("kind", "dimension", "gamma", "gamma_trainable", "flow")
    entity: nn.Embedding | None
    relation: nn.Embedding | None

    def __init__(
        self,
        interaction: Interaction,
        graph: KnowledgeGraph | None = None,
        dimension: int = 1024,
        gamma: float = 0.0,
        gamma_trainable: bool = False,
        loss: EmbeddingLoss | None = None,
        regulariser: Regulariser | None = None,
        dropout: float = 0.0,
        init: Init | None = None,
        tuning: EmbeddingTuning | None = None,
        ranking: LinkRanking | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if dimension < 1:
            raise ValueError(f"dimension must be >= 1, got {dimension}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.interaction = interaction
        self.graph = graph
        self.dimension = dimension
        self.gamma: float | nn.Parameter = gamma
        self.gamma_trainable = gamma_trainable
        self.loss: EmbeddingLoss = object_from_plain(EmbeddingLoss, loss) or BCESum()
        self.regulariser: Regulariser | None = object_from_plain(Regulariser, regulariser)
        self.dropout = dropout
        self.init: Init = from_plain(Init, init) or Init()
        self.tuning: EmbeddingTuning = from_plain(EmbeddingTuning, tuning) or EmbeddingTuning()
        self.ranking: LinkRanking = from_plain(LinkRanking, ranking) or LinkRanking()
        if self.tuning.sparse and (not self.loss.samples or gamma_trainable):
            raise ValueError("tuning.sparse needs a loss that samples entities (NegativeSampling) and a fixed gamma; set tuning.sparse to false")
        self.entity = None
        self.relation = None
        self._keys: Vectors | None = None
        self._evaluating = False

    def setup(self, stage: str) -> None:
        """Check the strategy, and copy the graph from the data module.

        Raises:
            MisconfigurationException: If ZeRO stage 3 partitions the tables, which every step reads whole.
        """
        if getattr(self.trainer.strategy, "zero_stage_3", False):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot run with ZeRO stage 3: it partitions the tables, which every step reads whole; use ddp or ZeRO-2 "
                "(--config base/deepspeed_zero2.yaml)"
            )
        super().setup(stage)

    def configure_model(self) -> None:
        """Create the tables; a second call, or a call without a graph, does nothing."""
        if self.entity is not None or self.graph is None:
            return
        parts = self.interaction.entity_parts, self.interaction.relation_parts
        sizes = self.graph.num_entities, self.graph.num_relations
        widths = [len(names) * self.dimension for names in parts]
        # Drawn on the CPU in single precision, so that a seed gives the same model on every device and in every precision.
        entity, relation = (torch.empty(size, width, device="cpu", dtype=torch.float32) for size, width in zip(sizes, widths, strict=True))
        self.init.fill(entity, len(parts[0]))
        if parts[1] == ("phase",):
            Init("uniform", math.pi).fill(relation, 1)
        else:
            self.init.fill(relation, len(parts[1]))
        # `_weight` avoids the default initialisation of the layer.
        self.entity, self.relation = (
            nn.Embedding(len(table), table.shape[1], sparse=self.tuning.sparse, _weight=table.to(self.device, torch.get_default_dtype()))
            for table in (entity, relation)
        )
        if self.gamma_trainable:
            # One dimension, because DeepSpeed cannot shard scalars.
            self.gamma = nn.Parameter(torch.full((1,), float(self.gamma), device=self.device))
        log.info("%s: created tables of entities, %s x %s, and relations, %s x %s", type(self).__name__, sizes[0], widths[0], sizes[1], widths[1])

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has created the tables."""
        return self.entity is not None

    @property
    def tables(self) -> tuple[nn.Embedding, nn.Embedding]:
        """Tables of entities and relations.

        Raises:
            MisconfigurationException: If they have not been created yet.
        """
        self.check_built()
        assert self.entity is not None
        assert self.relation is not None
        return self.entity, self.relation

    @full_precision
    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return the vectors and biases of queries ``(h, r, ?)``, given by ids ``(B,)``; the bias includes the margin."""
        return self._query(full(self.tables[0](head)), full(self.tables[1](relation)))

    def _query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return the vectors and biases of queries, given by rows of the tables in full precision."""
        drops = self.training and torch.is_grad_enabled()
        query = self.interaction.query(*(F.dropout(rows, self.dropout, drops) for rows in (head, relation)))
        if not self.interaction.distance:
            return query
        assert query.bias is not None  # the bias of a distance contains the norm of the query
        return query._replace(bias=query.bias + self.gamma)

    @full_precision
    def key(self, entity: Tensor | None = None) -> Vectors:
        """Return the vectors and biases of entities, given by ids ``(N,)``, or of all entities. Those of all entities are cached in an evaluation."""
        table = self.tables[0]
        if entity is not None:
            return self.interaction.key(full(table(entity)))
        if not self._evaluating or torch.is_grad_enabled():
            return self.interaction.key(full(table.weight))
        if self._keys is None:
            self._keys = self.interaction.key(full(table.weight))
        return self._keys

    @full_precision
    def compute_loss(self, batch: QueryBatch) -> LossOutput:
        """Compute the loss, a mean over the true tails of the optimizer step, or over its queries for :class:`KvsAll`."""
        # Padding queries get weight 0. Removing them would synchronise, because their number is not known on the CPU.
        seed = self._sampling_seed() if self.loss.samples else 0
        positives = Positives(batch.target, batch.target_row, len(batch), batch.sample_id >= 0, batch.one_each, batch.sample_id, seed)
        weight = self.loss.weight(positives)
        step = batch.num_step_rows if self.loss.per_query else batch.num_step_tokens
        normaliser = weight.clamp_min(1) if step is None else step
        entity, relation = self.tables
        # If the loss has a dense gradient of the entity table, the sparse gradient of the heads is added to it row by row, which saves a second dense
        # gradient. Only on a CPU, because coalescing a sparse gradient synchronises on other devices.
        sparse = entity.sparse or (not self.loss.samples and entity.weight.device.type == "cpu")
        heads = F.embedding(batch.head, entity.weight, sparse=sparse)
        query = self._query(full(heads), full(relation(batch.relation)))
        loss: Tensor = self.loss(query, entity, self.interaction.key, positives, normaliser)
        if self.regulariser is None:
            return LossOutput(loss, {}, weight)
        penalty = self._penalty(batch, positives, query) / normaliser
        return LossOutput(loss + penalty, {"penalty": penalty.detach()}, weight)

    def _sampling_seed(self) -> Tensor | int:
        """Return the seed of sampled entities, equal in all batches of an optimizer step, and in all evaluations."""
        if self.training and self.attached is None:
            # Added on the host, so that a step does not synchronise.
            return torch.randint(1 << 32, (), device="cpu")
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) * 1_000_003 + (self.global_step if self.training else -1)

    def log_loss(self, batch: QueryBatch, split: Split) -> None:
        """Accumulate the loss in validation; a test computes ranks only."""
        if split == "val":
            super().log_loss(batch, split)

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Metrics over both directions, and the mean reciprocal rank of each direction."""
        return ("mrr", "mr", *(f"hits_{k}" for k in self.ranking.ks), "mrr_tail", "mrr_head")

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of filtered ranks."""
        assert self.graph is not None
        return {"ranking": LinkPredictionMetrics(self.graph.num_relations, self.ranking.ks, self.ranking.ties)}

    @full_precision
    @torch.no_grad()
    def evaluate(self, batch: QueryBatch, metrics: dict[str, Metric]) -> None:
        """Rank the true tails among all entities, and update the metrics."""
        for part, scores in self._scores(batch, ranking=True):
            true, known = QueryEntities(part.target, None if part.one_each else part.target_row), QueryEntities(part.known, part.known_row)
            for metric in metrics.values():
                metric.update(scores, true, known, part.relation, part.sample_id)

    @full_precision
    @torch.no_grad()
    def predict_step(self, batch: QueryBatch, batch_idx: int = 0) -> Recommendations:
        """Find the best answers to each query; ``item_ids`` are entities, or relations for queries ``(h, ?, t)``."""
        assert self.graph is not None
        width = min(self.ranking.top_k, max(self.graph.num_entities, len(self.graph.relations)))
        relation_queries = batch.relation < 0
        tails = batch if batch.tail is None else select_rows(batch, ~relation_queries)
        found = [self._best_answers(part, scores, width) for part, scores in self._scores(tails)]
        if batch.tail is not None and relation_queries.any():
            part = select_rows(batch, relation_queries)
            found.append(self._best_answers(part, self.score_relations(part.head, batch.tail[relation_queries]), width))
        order = relation_queries.long().argsort(stable=True).argsort()
        return Recommendations(*(torch.cat(parts)[order] for parts in zip(*found, strict=True)))

    def _best_answers(self, batch: QueryBatch, scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
        check_scores(scores)
        if self.ranking.exclude_known:
            scores[batch.known_row, batch.known] = -torch.inf
        best = scores.topk(min(width, scores.shape[1]), 1)
        values = F.pad(best.values.float(), (0, width - best.values.shape[1]), value=-torch.inf)
        return F.pad(best.indices, (0, width - best.indices.shape[1]), value=-1).masked_fill(values == -torch.inf, -1), values

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return Adam without weight decay, with the settings of ``tuning``."""
        if self.tuning.sparse:
            return torch.optim.SparseAdam(groups, lr=self.tuning.lr)
        fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
        return torch.optim.Adam(groups, lr=self.tuning.lr, fused=fused)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return an exponential decay with the settings of ``tuning``, or ``None`` for a constant rate."""
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, self.tuning.lr_decay) if self.tuning.lr_decay != 1 else None

    def configure_optimizers(self) -> Any:
        """Return optimizer and scheduler; the default scheduler is stepped after each epoch.

        Raises:
            MisconfigurationException: If the tables are float16.
        """
        self._check_training_dtype()
        configured = super().configure_optimizers()
        if isinstance(configured, dict) and self.lr_scheduler is None:
            configured["lr_scheduler"]["interval"] = "epoch"
        return configured

    def _check_training_dtype(self) -> None:
        """Raise an error for float16 tables and warn for bfloat16 tables, whose updates are rounded; DeepSpeed trains float32 copies."""
        dtype, trainer = self.tables[0].weight.dtype, self.attached
        if dtype not in (torch.float16, torch.bfloat16) or (
            trainer is not None and getattr(trainer.strategy, "handles_gradient_accumulation", False)
        ):
            return
        advice = "use precision 32-true, which computes as fast: scores and losses of graphs are float32 in every precision"
        if dtype is torch.float16:
            raise MisconfigurationException(
                f"the embedding tables of {type(self).__name__} cannot be trained in float16: Adam's epsilon underflows; {advice}"
            )
        rank_zero_warn(f"the embedding tables of {type(self).__name__} are trained in bfloat16: updates below 1/256 of an entry are lost; {advice}")

    def on_validation_epoch_start(self) -> None:
        """Start to cache the vectors of all entities."""
        self._start_cache()

    def on_test_epoch_start(self) -> None:
        """Start to cache the vectors of all entities."""
        self._start_cache()

    def on_predict_epoch_start(self) -> None:
        """Start to cache the vectors of all entities."""
        self._start_cache()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and clear the cache."""
        super().on_validation_epoch_end()
        self._clear_cache()

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and clear the cache."""
        super().on_test_epoch_end()
        self._clear_cache()

    def on_predict_epoch_end(self) -> None:
        """Clear the cache."""
        self._clear_cache()

    def settings(self) -> dict[str, Any]:
        """Return the interaction with its options, and the other settings that affect scores."""
        settings: dict[str, Any] = {name: value for name, value in super().settings().items() if name in ("dimension", "gamma", "gamma_trainable")}
        options = {name: value for name, value in vars(self.interaction).items() if isinstance(value, (bool, int, float, str))}
        return {"interaction": type(self.interaction).__name__, **settings, **options}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check graph and settings of the checkpoint, and create the tables if they do not exist."""
        super().on_load_checkpoint(checkpoint)
        self.check_settings(checkpoint)
        self.configure_model()
        self._clear_cache()

    def _start_cache(self) -> None:
        self._keys, self._evaluating = None, True

    def _clear_cache(self) -> None:
        self._keys, self._evaluating = None, False

    def _scores(self, batch: QueryBatch, ranking: bool = False) -> Iterator[tuple[QueryBatch, Tensor]]:
        """Yield parts of the queries with their scores of all entities, ``(B, E)``, of at most ``max_scores`` scores each.

        For a ranking, the bias of the query is left out. It does not affect ranks, but adding it could round different scores to the same number.
        """
        key = self.key()
        size = max(1, self.ranking.max_scores // len(key.vector))
        place = torch.arange(len(batch), device=batch.head.device)
        for start in range(0, len(batch), size):
            part = batch if size >= len(batch) else select_rows(batch, (place >= start) & (place < start + size))
            query = self.query(part.head, part.relation)
            yield part, score_all(query._replace(bias=None) if ranking else query, key)

    def _penalty(self, batch: QueryBatch, positives: Positives, query: Vectors) -> Tensor:
        assert self.regulariser is not None
        entity, relation = self.tables
        names = self.interaction.entity_parts, self.interaction.relation_parts
        tails = full(entity(positives.target))
        rows = (
            self._moduli(full(entity(batch.head[positives.row])), names[0]),
            self._moduli(full(relation(batch.relation[positives.row])), names[1]),
            self._moduli(tails, names[0]),
        )
        penalties: Tensor = self.regulariser(rows, query.rows(positives.row), self.interaction.key(tails))
        return penalties @ positives.weights.to(penalties.dtype)

    def _moduli(self, rows: Tensor, parts: tuple[str, ...]) -> Tensor:
        if parts == ("phase",):
            return torch.ones_like(rows)
        if not self.interaction.complex_parts:
            return rows.abs()
        real, imaginary = rows.chunk(2, -1)
        return (real.square() + imaginary.square()).clamp_min(torch.finfo(rows.dtype).tiny).sqrt()


def select_rows(batch: QueryBatch, chosen: Tensor) -> QueryBatch:
    """Return the queries of a batch where ``chosen``, ``(B,)`` bool, is true, with their true and known tails."""
    number = chosen.cumsum(0) - 1
    true, known = chosen[batch.target_row], chosen[batch.known_row]
    return batch.replace(
        sample_id=batch.sample_id[chosen],
        head=batch.head[chosen],
        relation=batch.relation[chosen],
        target=batch.target[true],
        target_row=number[batch.target_row[true]],
        known=batch.known[known],
        known_row=number[batch.known_row[known]],
        tail=None if batch.tail is None else batch.tail[chosen],
    )
