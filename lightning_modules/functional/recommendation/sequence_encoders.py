"""Encoders of sequences of items: SASRec, BERT4Rec and GRU4Rec. HSTU is in ``hstu.py``.

An encoder maps the items of a batch to one state for each position, whose inner product with the embedding of an item is the item's score.

Shapes: B rows, T positions, N items, d width, H heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malleable.lightning_modules.functional.dropout import ByteDropout
from malleable.lightning_modules.functional.recommendation.sequence_layout import SequenceLayout

INIT_STD = 0.02


class SequenceEncoder(nn.Module, ABC):
    """Base class of encoders: embeddings of items and of types of interactions.

    Padding has no embedding: its input is 0.

    Args:
        num_items: N.
        dim: Width d.
        dropout: Dropout probability of the inputs.
        num_behaviors: Number of types of interactions; 0 for none.
    """

    reads_times = False
    """Whether the encoder needs the times of the items."""
    normalizes_inputs = False
    """Whether the encoder normalises the sum of embeddings; otherwise, embeddings of items are multiplied by ``sqrt(d)``."""

    def __init__(self, num_items: int, dim: int, dropout: float, num_behaviors: int = 0) -> None:
        super().__init__()
        self.item = nn.Embedding(num_items, dim)
        self.behavior = nn.Embedding(num_behaviors, dim) if num_behaviors else None
        self.dropout = ByteDropout(dropout)
        self.scale = 1.0 if self.normalizes_inputs else math.sqrt(dim)

    @abstractmethod
    def encode(self, inputs: Tensor, layout: SequenceLayout, times: Tensor | None) -> Tensor:
        """Return the states ``(B, T, d)`` of embedded items ``(B, T, d)``."""

    def forward(
        self,
        items: Tensor,
        layout: SequenceLayout,
        times: Tensor | None = None,
        behaviors: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Encode sequences.

        Args:
            items: ``(B, T)`` int64, -1 at padding.
            layout: Sequences of the positions.
            times: ``(B, T)`` float64, time of each item.
            behaviors: ``(B, T)`` int64, type of each interaction, -1 if unknown.
            masked: ``(B, T)`` bool, positions whose item is hidden; only for encoders with a mask vector.

        Returns:
            ``(B, T, d)``; 0 at padding.
        """
        inputs = self.item(items.clamp_min(0))
        if masked is not None:
            inputs = torch.where(masked[..., None], self.mask_vector, inputs)
        inputs = inputs * self.scale
        if self.behavior is not None and behaviors is not None:
            known = (behaviors >= 0) if masked is None else (behaviors >= 0) & ~masked
            inputs = inputs + self.behavior(behaviors.clamp_min(0)) * known[..., None]
        elif self.behavior is not None:
            # DDP needs a gradient of every parameter.
            inputs = inputs + 0 * self.behavior.weight.sum()
        return self.encode(inputs, layout, times) * layout.real[..., None]

    def init_weights(self) -> None:
        """Draw all weights: matrices from a normal distribution, biases 0, gains 1."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def mask_vector(self) -> Tensor:
        """Embedding of hidden items, ``(d,)``."""
        raise TypeError(f"{type(self).__name__} has no vector for hidden items")


class Transformer(SequenceEncoder):
    """Transformer with post-norm blocks and learned positions: SASRec if it is causal, BERT4Rec otherwise.

    Args:
        num_items: N.
        dim: Width d.
        num_layers: Number of blocks.
        num_heads: H.
        dropout: Dropout probability of inputs, of attention weights and of the outputs of layers.
        max_length: Maximum number of items of a sequence.
        ffn_dim: Width of the feed-forward layers.
        causal: Attend to earlier items only.
        num_behaviors: Number of types of interactions; 0 for none.

    Source:
        Kang and McAuley (2018), Self-Attentive Sequential Recommendation, arXiv:1808.09781, section III.
        Sun et al. (2019), BERT4Rec, arXiv:1904.06690, section 3.
        Differs: post-norm blocks with GELU and normalised inputs for both, as in BERT4Rec; positions count from the first item of the sequence;
        BERT4Rec scores items by the inner product, without a projection and without biases of items.
    """

    normalizes_inputs = True

    def __init__(
        self,
        num_items: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_length: int,
        ffn_dim: int,
        causal: bool = True,
        num_behaviors: int = 0,
    ) -> None:
        super().__init__(num_items, dim, dropout, num_behaviors)
        self.causal = causal
        # One more than `max_length`: BERT4Rec appends a hidden item, and a training row has one more item than a history.
        self.position = nn.Embedding(max_length + 1, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers))
        self.mask = None if causal else nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        """Draw all weights."""
        super().init_weights()
        if self.mask is not None:
            nn.init.normal_(self.mask, std=INIT_STD)

    @property
    def mask_vector(self) -> Tensor:
        """Embedding of hidden items, ``(d,)``."""
        return super().mask_vector if self.mask is None else self.mask

    def encode(self, inputs: Tensor, layout: SequenceLayout, times: Tensor | None) -> Tensor:
        """Return the states ``(B, T, d)`` of embedded items."""
        states: Tensor = self.dropout(self.norm(inputs + self.position(layout.position)) * layout.real[..., None])
        mask = layout.attention_mask(self.causal)
        for block in self.blocks:
            states = block(states, mask)
        return states


class Block(nn.Module):
    """Post-norm block of self-attention and a feed-forward layer.

    Args:
        dim: Width d.
        num_heads: H.
        ffn_dim: Width of the feed-forward layer.
        dropout: Dropout probability.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        self.attention_dropout = dropout
        self.dropout = ByteDropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return new states ``(B, T, d)``.

        Args:
            states: ``(B, T, d)``.
            mask: ``(B, 1, T, T)`` bool, as :meth:`SequenceLayout.attention_mask` returns.
        """
        query, key, value = self.query_key_value(states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=self.attention_dropout if self.training else 0.0)
        states = self.attention_norm(states + self.dropout(self.output(found.transpose(1, 2).flatten(2))))
        result: Tensor = self.ffn_norm(states + self.dropout(self.ffn(states)))
        return result


class GRU4Rec(SequenceEncoder):
    """Gated recurrent units over the items.

    Args:
        num_items: N.
        dim: Width d of embeddings and states.
        num_layers: Number of recurrent layers.
        dropout: Dropout probability of inputs and between layers.
        num_behaviors: Number of types of interactions; 0 for none.

    Source:
        Hidasi et al. (2016), Session-based Recommendations with Recurrent Neural Networks, arXiv:1511.06939.
        Differs: embeddings instead of one-hot vectors, which also score the items; whole sequences instead of parallel mini-batches of steps.
    """

    def __init__(self, num_items: int, dim: int, num_layers: int, dropout: float, num_behaviors: int = 0) -> None:
        super().__init__(num_items, dim, dropout, num_behaviors)
        self.gru = nn.GRU(dim, dim, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0)
        self.norm = nn.LayerNorm(dim)

    def encode(self, inputs: Tensor, layout: SequenceLayout, times: Tensor | None) -> Tensor:
        """Return the states ``(B, T, d)`` of embedded items."""
        states, _ = self.gru(layout.unpack(self.dropout(inputs)))
        return layout.pack(self.norm(states))
