"""Settings of knowledge-graph embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.metrics.ranking import Ties, check_ks

MAX_SCORES = 1 << 26  # maximum number of scores in memory during evaluation: 256 MB


@dataclass
class Init:
    """Initialisation of the embedding tables.

    Attributes:
        kind: Distribution of the entries.
        scale: Bound of ``uniform``, standard deviation of ``normal``, or gain of the Xavier distributions, whose fans are the numbers of rows and
            columns of a part of the table.
    """

    kind: Literal["uniform", "normal", "xavier_uniform", "xavier_normal"] = "uniform"
    scale: float = 0.1

    def __post_init__(self) -> None:
        """Check the scale."""
        check_numbers(self, "init.", above={"scale": 0})

    @torch.no_grad()
    def fill(self, table: Tensor, parts: int) -> None:
        """Draw the entries of a table ``(N, parts x D)``."""
        for part in table.chunk(parts, 1):
            if self.kind == "uniform":
                part.uniform_(-self.scale, self.scale)
            elif self.kind == "normal":
                part.normal_(0, self.scale)
            else:
                getattr(nn.init, f"{self.kind}_")(part, self.scale)


@dataclass
class EmbeddingTuning:
    """Settings of the default optimizer and scheduler.

    Attributes:
        lr: Learning rate of Adam.
        lr_decay: Factor by which the learning rate is multiplied after each epoch.
        sparse: Update only the rows that occur in a batch; for losses that sample entities, on large graphs.
    """

    lr: float = 1e-3
    lr_decay: float = 1.0
    sparse: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "tuning.", above={"lr": 0, "lr_decay": 0})


@dataclass
class LinkRanking:
    """Settings of evaluation and prediction.

    Attributes:
        ks: Cut-offs of hits.
        ties: Rank of a true tail among entities of equal score: ``optimistic`` (first), ``realistic`` (mean) or ``pessimistic`` (last).
        top_k: Number of answers that ``predict`` returns for each query.
        exclude_known: Do not return answers that are known, i.e. in ``known`` of the batch.
        max_scores: Maximum number of scores in memory.
    """

    ks: tuple[int, ...] = (1, 3, 10)
    ties: Ties = "pessimistic"
    top_k: int = 10
    exclude_known: bool = True
    max_scores: int = MAX_SCORES

    def __post_init__(self) -> None:
        """Check the values."""
        self.ks = check_ks(self.ks)
        check_numbers(self, "ranking.", at_least={"top_k": 1, "max_scores": 1})
