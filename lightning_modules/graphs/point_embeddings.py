"""Point-vector embeddings of knowledge graphs through the same tables, losses and ranking: the baselines of every table."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import KnowledgeGraph
from malleable.lightning_modules.functional.graphs.points import ComplexDiagonal, Diagonal, Rotation, Translation
from malleable.lightning_modules.graphs.knowledge_graph import KnowledgeGraphModule
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.losses.embedding import EmbeddingLoss, Regulariser


class TransE(KnowledgeGraphModule):
    """A relation translates: ``gamma - |h + r - t|^2``.

    Args:
        dimension: Width of entities and relations.
        gamma: Margin, added to every score.
        gamma_trainable: Learn it.
        graph: The labels; taken from the data module when left out.
        loss: What is minimised; default: binary cross-entropy against all entities.
        regulariser: Penalty beside it.
        dropout: Share of the entries of heads and relations that are dropped in training.
        init: How tables start.
        tuning: Rates of the default optimizer and schedule.
        ranking: Cut-offs, ties, answers.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead, stepped every optimizer step.

    Source:
        Bordes et al. (2013), Translating Embeddings for Modeling Multi-relational Data, NeurIPS 26.
        Differs: squared L2 norm, reciprocal relations, no projection to the unit sphere; the loss is ours to choose.
    """

    def __init__(
        self,
        dimension: int = 1024,
        gamma: float = 0.0,
        gamma_trainable: bool = False,
        graph: KnowledgeGraph | None = None,
        loss: EmbeddingLoss | None = None,
        regulariser: Regulariser | None = None,
        dropout: float = 0.0,
        init: Init | None = None,
        tuning: EmbeddingTuning | None = None,
        ranking: LinkRanking | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        parts = (loss, regulariser, dropout, init, tuning, ranking, optimizer, lr_scheduler)
        super().__init__(Translation(), graph, dimension, gamma, gamma_trainable, *parts)
        self.save_config()


class DistMult(KnowledgeGraphModule):
    """A relation scales: ``<h, r, t>``.

    Args:
        dimension: Width of entities and relations.
        graph: The labels; taken from the data module when left out.
        loss: What is minimised; default: binary cross-entropy against all entities.
        regulariser: Penalty beside it.
        dropout: Share of the entries of heads and relations that are dropped in training.
        init: How tables start.
        tuning: Rates of the default optimizer and schedule.
        ranking: Cut-offs, ties, answers.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead, stepped every optimizer step.

    Source:
        Yang et al. (2015), Embedding Entities and Relations for Learning and Inference in Knowledge Bases, arXiv:1412.6575, Eq. 3.
        Differs: reciprocal relations; the loss is ours to choose.
    """

    def __init__(
        self,
        dimension: int = 1024,
        graph: KnowledgeGraph | None = None,
        loss: EmbeddingLoss | None = None,
        regulariser: Regulariser | None = None,
        dropout: float = 0.0,
        init: Init | None = None,
        tuning: EmbeddingTuning | None = None,
        ranking: LinkRanking | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        parts = (loss, regulariser, dropout, init, tuning, ranking, optimizer, lr_scheduler)
        super().__init__(Diagonal(), graph, dimension, 0.0, False, *parts)
        self.save_config()


class ComplEx(KnowledgeGraphModule):
    """A relation scales complex coordinates: ``Re <h, r, conj t>``.

    Args:
        dimension: Complex width D: rows have 2D numbers.
        graph: The labels; taken from the data module when left out.
        loss: What is minimised; default: binary cross-entropy against all entities.
        regulariser: Penalty beside it.
        dropout: Share of the entries of heads and relations that are dropped in training.
        init: How tables start.
        tuning: Rates of the default optimizer and schedule.
        ranking: Cut-offs, ties, answers.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead, stepped every optimizer step.

    Source:
        Trouillon et al. (2016), Complex Embeddings for Simple Link Prediction, arXiv:1606.06357, Eq. 11; reciprocal relations and N3
        from Lacroix, Usunier, Obozinski (2018), arXiv:1806.07297.
        Differs: the loss is ours to choose.
    """

    def __init__(
        self,
        dimension: int = 1024,
        graph: KnowledgeGraph | None = None,
        loss: EmbeddingLoss | None = None,
        regulariser: Regulariser | None = None,
        dropout: float = 0.0,
        init: Init | None = None,
        tuning: EmbeddingTuning | None = None,
        ranking: LinkRanking | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        parts = (loss, regulariser, dropout, init, tuning, ranking, optimizer, lr_scheduler)
        super().__init__(ComplexDiagonal(), graph, dimension, 0.0, False, *parts)
        self.save_config()


class RotatE(KnowledgeGraphModule):
    """A relation rotates complex coordinates: ``gamma - |h exp(i theta) - t|^2``.

    Args:
        dimension: Complex width D: entities have 2D numbers, relations D angles.
        gamma: Margin, added to every score.
        gamma_trainable: Learn it.
        graph: The labels; taken from the data module when left out.
        loss: What is minimised; default: binary cross-entropy against all entities.
        regulariser: Penalty beside it.
        dropout: Share of the entries of heads and relations that are dropped in training.
        init: How tables start.
        tuning: Rates of the default optimizer and schedule.
        ranking: Cut-offs, ties, answers.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead, stepped every optimizer step.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 3.
        Differs: squared L2 norm instead of the sum of moduli, reciprocal relations; the loss is ours to choose.
    """

    def __init__(
        self,
        dimension: int = 1024,
        gamma: float = 0.0,
        gamma_trainable: bool = False,
        graph: KnowledgeGraph | None = None,
        loss: EmbeddingLoss | None = None,
        regulariser: Regulariser | None = None,
        dropout: float = 0.0,
        init: Init | None = None,
        tuning: EmbeddingTuning | None = None,
        ranking: LinkRanking | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        parts = (loss, regulariser, dropout, init, tuning, ranking, optimizer, lr_scheduler)
        super().__init__(Rotation(), graph, dimension, gamma, gamma_trainable, *parts)
        self.save_config()
