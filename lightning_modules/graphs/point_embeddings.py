"""Point embeddings of knowledge graphs, with the tables, losses and ranking of all graph modules."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import KnowledgeGraph
from malleable.lightning_modules.functional.graphs.points import ComplexDiagonal, Diagonal, Rotation, Translation
from malleable.lightning_modules.graphs.knowledge_graph import KnowledgeGraphModule
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.losses.embedding import EmbeddingLoss, Regulariser


class TransE(KnowledgeGraphModule):
    """TransE, in which relations are translations: ``gamma - |h + r - t|^2``.

    Args:
        dimension: Width of entities and relations.
        gamma: Margin that is added to every score.
        gamma_trainable: Whether gamma is trained.
        graph: Labels of entities and relations. Default: taken from the data module.
        loss: Training loss. Default: binary cross-entropy over all entities (:class:`BCESum`).
        regulariser: Penalty that is added to the loss.
        dropout: Dropout probability of the entries of heads and relations.
        init: Initialisation of the tables.
        tuning: Settings of the default optimizer and scheduler.
        ranking: Settings of evaluation and prediction.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, stepped after every optimizer step, instead of the default one.

    Source:
        Bordes et al. (2013), Translating Embeddings for Modeling Multi-relational Data, NeurIPS 26.
        Differs: squared L2 norm, reciprocal relations, no projection to the unit sphere, selectable loss.
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
    """DistMult, in which relations scale each coordinate: ``<h, r, t>``.

    Args:
        dimension: Width of entities and relations.
        graph: Labels of entities and relations. Default: taken from the data module.
        loss: Training loss. Default: binary cross-entropy over all entities (:class:`BCESum`).
        regulariser: Penalty that is added to the loss.
        dropout: Dropout probability of the entries of heads and relations.
        init: Initialisation of the tables.
        tuning: Settings of the default optimizer and scheduler.
        ranking: Settings of evaluation and prediction.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, stepped after every optimizer step, instead of the default one.

    Source:
        Yang et al. (2015), Embedding Entities and Relations for Learning and Inference in Knowledge Bases, arXiv:1412.6575, Eq. 3.
        Differs: reciprocal relations, selectable loss.
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
    """ComplEx, in which relations scale complex coordinates: ``Re <h, r, conj t>``.

    Args:
        dimension: Number D of complex coordinates; rows have 2D numbers.
        graph: Labels of entities and relations. Default: taken from the data module.
        loss: Training loss. Default: binary cross-entropy over all entities (:class:`BCESum`).
        regulariser: Penalty that is added to the loss.
        dropout: Dropout probability of the entries of heads and relations.
        init: Initialisation of the tables.
        tuning: Settings of the default optimizer and scheduler.
        ranking: Settings of evaluation and prediction.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, stepped after every optimizer step, instead of the default one.

    Source:
        Trouillon et al. (2016), Complex Embeddings for Simple Link Prediction, arXiv:1606.06357, Eq. 11; reciprocal relations and N3
        from Lacroix, Usunier, Obozinski (2018), arXiv:1806.07297.
        Differs: selectable loss.
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
    """RotatE, in which relations rotate complex coordinates: ``gamma - |h exp(i theta) - t|^2``.

    Args:
        dimension: Number D of complex coordinates; entities have 2D numbers, relations D angles.
        gamma: Margin that is added to every score.
        gamma_trainable: Whether gamma is trained.
        graph: Labels of entities and relations. Default: taken from the data module.
        loss: Training loss. Default: binary cross-entropy over all entities (:class:`BCESum`).
        regulariser: Penalty that is added to the loss.
        dropout: Dropout probability of the entries of heads and relations.
        init: Initialisation of the tables.
        tuning: Settings of the default optimizer and scheduler.
        ranking: Settings of evaluation and prediction.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, stepped after every optimizer step, instead of the default one.

    Source:
        Sun et al. (2019), RotatE, arXiv:1902.10197, Eq. 3.
        Differs: squared L2 norm instead of the sum of moduli, reciprocal relations, selectable loss.
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
