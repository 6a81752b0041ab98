"""Settings of knowledge-graph embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malleable.lightning_modules.metrics.ranking import Ties, check_ks

MAX_SCORES = 1 << 26  # scores of evaluation kept at once: 256 MB


@dataclass
class Init:
    """How tables start.

    Attributes:
        kind: Distribution of every entry of a part.
        scale: Bound of ``uniform``, standard deviation of ``normal``, gain of the two Xavier forms (whose fans are rows and width).
    """

    kind: Literal["uniform", "normal", "xavier_uniform", "xavier_normal"] = "uniform"
    scale: float = 0.1

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
    """The optimizer's course, where no optimizer or scheduler is injected.

    Attributes:
        lr: Learning rate of Adam.
        lr_decay: Factor of the rate after each epoch.
        sparse: Update only the rows that a batch touches; for losses that draw entities, on large graphs.
    """

    lr: float = 1e-3
    lr_decay: float = 1.0
    sparse: bool = False


@dataclass
class LinkRanking:
    """How answers are ranked.

    Attributes:
        ks: Cut-offs of hits.
        ties: Where a true tail lies among entities of equal score.
        top_k: Answers that ``predict`` gives to each query.
        exclude_known: Leave out of them what the batch lists as known.
        max_scores: Most scores to keep at once, which bounds memory.
    """

    ks: tuple[int, ...] = (1, 3, 10)
    ties: Ties = "pessimistic"
    top_k: int = 10
    exclude_known: bool = True
    max_scores: int = MAX_SCORES

    def __post_init__(self) -> None:
        """Check the cut-offs."""
        self.ks = check_ks(self.ks)
