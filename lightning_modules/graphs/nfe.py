"""Knowledge-graph embedding by normalizing flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import KnowledgeGraph
from malleable.lightning_modules.functional.graphs.flows import NFE1, NFE2, NFE3, AffinePoint, Base, Sigma
from malleable.lightning_modules.functional.graphs.interaction import Interaction
from malleable.lightning_modules.graphs.knowledge_graph import KnowledgeGraphModule
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.losses.embedding import EmbeddingLoss, Regulariser
from malleable.lightning_modules.serialization import from_plain

Kind = Literal["nfe1", "nfe2", "nfe3", "affine_point", "sigma"]


@dataclass
class Flow:
    """Options of the flows; the defaults are those of the authors' code.

    Attributes:
        base: Base variable of ``nfe2``: ``normal`` or ``uniform``.
        swap_on_negative_scale: Whether a negative scale exchanges the slopes below and above zero in ``nfe2``, as it does in the flow.
        consistent: Whether deviations are scaled by ``|a|`` in ``nfe3``, as in the flow, instead of ``softplus(a)``.
        min_deviation: Lower bound of the deviations in ``nfe3``, > 0.
    """

    base: Base = "normal"
    swap_on_negative_scale: bool = False
    consistent: bool = False
    min_deviation: float = 1e-4


class NFE(KnowledgeGraphModule):
    """Normalizing-flow embedding: entities are random variables, relations are maps, and the score is minus the distance of mapped head and tail.

    Args:
        kind: ``nfe1`` (affine flows, mean-squared distance), ``nfe2`` (two slopes), ``nfe3`` (Kullback-Leibler divergence), and the ablations
            ``affine_point`` (without uncertainty) and ``sigma`` (uncertainty only).
        dimension: Width D of each part of a row.
        gamma: Margin that is added to every score.
        gamma_trainable: Whether gamma is trained.
        flow: Options of the flows.
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
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764.
        Differs: ablations do not allocate unused parameters; deviations of ``nfe3`` have a lower bound.
    """

    def __init__(
        self,
        kind: Kind = "nfe1",
        dimension: int = 1024,
        gamma: float = 0.0,
        gamma_trainable: bool = False,
        flow: Flow | None = None,
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
        interaction = interaction_of(kind, from_plain(Flow, flow) or Flow())
        parts = (loss, regulariser, dropout, init, tuning, ranking, optimizer, lr_scheduler)
        super().__init__(interaction, graph, dimension, gamma, gamma_trainable, *parts)
        self.save_config()


def interaction_of(kind: Kind, flow: Flow) -> Interaction:
    """Return the interaction of a kind.

    Raises:
        ValueError: If the kind is unknown.
    """
    kinds: dict[str, Interaction] = {
        "nfe1": NFE1(),
        "nfe2": NFE2(flow.base, flow.swap_on_negative_scale),
        "nfe3": NFE3(flow.consistent, flow.min_deviation),
        "affine_point": AffinePoint(),
        "sigma": Sigma(),
    }
    if kind not in kinds:
        raise ValueError(f"kind must be one of {sorted(kinds)}, got {kind!r}")
    return kinds[kind]
