"""Settings of sequence encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.functional.recommendation.hstu import HSTU
from malleable.lightning_modules.functional.recommendation.sequence_encoders import GRU4Rec, SequenceEncoder, Transformer


@dataclass
class EncoderSettings:
    """Settings of the encoder of a :class:`~malleable.lightning_modules.recommendation.sequential.SequentialRecommender`.

    Attributes:
        kind: ``sasrec`` (causal Transformer), ``gru4rec``, ``bert4rec`` (Transformer trained to restore hidden items) or ``hstu``.
        dim: Width of embeddings and states.
        num_layers: Number of layers.
        num_heads: Number of attention heads; not used by ``gru4rec``.
        dropout: Dropout probability.
        max_length: Maximum number of items of a history; older ones are not read. ``split.sequence_length`` of the data must not be larger.
        ffn_dim: Width of the feed-forward layers of ``sasrec`` and ``bert4rec``; ``None``: ``dim``.
        mask_rate: Probability that ``bert4rec`` hides an item in training.
        last_rate: Probability that ``bert4rec`` hides only the last item of a sequence in training, as in a test.
        time_buckets: Number of buckets of differences of time of ``hstu``; 0: times are not read.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: Literal["sasrec", "gru4rec", "bert4rec", "hstu"] = "sasrec"
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.2
    max_length: int = 200
    ffn_dim: int | None = None
    mask_rate: float = 0.2
    last_rate: float = 0.1
    time_buckets: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        at_least = {"dim": 1, "num_layers": 1, "num_heads": 1, "dropout": 0, "max_length": 1, "ffn_dim": 1, "time_buckets": 0, "last_rate": 0}
        check_numbers(self, "encoder.", at_least=at_least, at_most={"last_rate": 1}, above={"mask_rate": 0}, below={"dropout": 1, "mask_rate": 1})
        if self.kind != "gru4rec" and self.dim % self.num_heads:
            raise ValueError(f"encoder.dim {self.dim} must be a multiple of encoder.num_heads {self.num_heads}")

    def build(self, num_items: int, num_behaviors: int = 0) -> SequenceEncoder:
        """Return an encoder with new weights.

        Args:
            num_items: Number of items.
            num_behaviors: Number of types of interactions; 0 for none.
        """
        encoder: SequenceEncoder
        if self.kind == "gru4rec":
            encoder = GRU4Rec(num_items, self.dim, self.num_layers, self.dropout, num_behaviors)
        elif self.kind == "hstu":
            encoder = HSTU(num_items, self.dim, self.num_layers, self.num_heads, self.dropout, self.max_length, self.time_buckets, num_behaviors)
        else:
            encoder = Transformer(
                num_items,
                self.dim,
                self.num_layers,
                self.num_heads,
                self.dropout,
                self.max_length,
                self.ffn_dim or self.dim,
                causal=self.kind == "sasrec",
                num_behaviors=num_behaviors,
            )
        encoder.init_weights()
        return encoder
