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
    """Where the flows may depart from the authors' code.

    Attributes:
        base: Base variable of ``nfe2``.
        swap_on_negative_scale: In ``nfe2`` a negative scale exchanges the slopes below and above zero, as the flow does.
        consistent: In ``nfe3`` deviations are scaled by ``|a|``, as the flow does, instead of ``softplus(a)``.
        min_deviation: Floor of the deviations of ``nfe3``, > 0.
    """

    base: Base = "normal"
    swap_on_negative_scale: bool = False
    consistent: bool = False
    min_deviation: float = 1e-4


class NFE(KnowledgeGraphModule):
    """Entities are random variables, relations maps of them, and a triple scores by how little the mapped head differs from the tail.

    Args:
        kind: ``nfe1`` (affine flows, mean-squared distance), ``nfe2`` (two slopes), ``nfe3`` (Kullback-Leibler divergence), and the ablations
            ``affine_point`` (without uncertainty) and ``sigma`` (uncertainty alone).
        dimension: Width D of each part of a row.
        gamma: Margin, added to every score.
        gamma_trainable: Learn it.
        flow: Departures from the authors' code.
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
        Xiao, He, Cao (2023), Knowledge Graph Embedding by Normalizing Flows, AAAI 37(4):4756-4764.
        Differs: ablations allocate only what they use; deviations of ``nfe3`` have a floor.
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
    """Make the interaction of a kind.

    Raises:
        ValueError: If there is no such kind.
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
