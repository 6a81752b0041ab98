"""HSTU: sequence encoder with pointwise gated attention and relative biases of time and position.

Shapes: B rows, T positions, d width, H heads, e = d / H width of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from malleable.lightning_modules.functional.dropout import ByteDropout
from malleable.lightning_modules.functional.recommendation.sequence_encoders import SequenceEncoder
from malleable.lightning_modules.functional.recommendation.sequence_layout import SequenceLayout

TIME_BASE = 0.301  # log(2) / 0.301 = 2.3 buckets for each doubling of a difference of time


class HSTU(SequenceEncoder):
    """Encoder of hierarchical sequential transduction units.

    Args:
        num_items: N, number of items.
        dim: Width d.
        num_layers: Number of units.
        num_heads: H.
        dropout: Dropout probability of inputs and outputs of a unit.
        max_length: Maximum number of items of a sequence.
        time_buckets: Number of buckets of differences of time; 0: no bias by time.
        num_behaviors: Number of types of interactions; 0 for none.

    Source:
        Zhai et al. (2024), Actions Speak Louder than Words, arXiv:2402.17152, section 3 and equations (1) to (3).
        Differs: query, key, value and gate have the width of a head; learned absolute positions are added to the inputs; the sum over items is
        divided by ``max_length``; differences are between the times of two items, not between the time of a request and of an item.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_length: int,
        time_buckets: int = 64,
        num_behaviors: int = 0,
    ) -> None:
        super().__init__(num_items, dim, dropout, num_behaviors)
        self.reads_times = time_buckets > 0
        self.max_length = max_length
        self.position = nn.Embedding(max_length + 1, dim)
        self.num_buckets = time_buckets
        self.units = nn.ModuleList(Unit(dim, num_heads, dropout, max_length, time_buckets) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def init_weights(self) -> None:
        """Draw all weights; the relative biases start at 0."""
        super().init_weights()
        for name, parameter in self.named_parameters():
            if "_bias." in name:
                nn.init.zeros_(parameter)

    def encode(self, inputs: Tensor, layout: SequenceLayout, times: Tensor | None) -> Tensor:
        """Return the states ``(B, T, d)`` of embedded items."""
        states = self.dropout((inputs + self.position(layout.position)) * layout.real[..., None])
        allowed = layout.attention_mask()
        # Within a sequence, the number of items between two positions is the difference of their columns.
        column = torch.arange(inputs.shape[1], device=inputs.device)
        distance = (column[:, None] - column).clamp(0, self.max_length)
        buckets = time_buckets(times, self.num_buckets) if times is not None and self.reads_times else None
        for unit in self.units:
            states = unit(states, allowed, distance, buckets)
        result: Tensor = self.norm(states)
        return result


class Unit(nn.Module):
    """Pointwise gated attention.

    ``U, V, Q, K = split(silu(f1(norm(X))))``, ``A = silu(Q K' + bias) / n``, ``Y = X + f2(norm(A V) * U)``, with ``n`` the maximum length.

    Args:
        dim: Width d.
        num_heads: H.
        dropout: Dropout probability of the output.
        max_length: Maximum number of items of a sequence.
        time_buckets: Number of buckets of differences of time; 0: no bias by time.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, max_length: int, time_buckets: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.input_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        # The inputs are means over max_length items, mostly of small values: their variance can be 1e-8, far less than the default epsilon.
        self.attention_norm = nn.LayerNorm(dim, eps=1e-10)
        self.output = nn.Linear(dim, dim)
        self.dropout = ByteDropout(dropout)
        self.position_bias = nn.Embedding(max_length + 1, num_heads)
        self.time_bias = nn.Embedding(time_buckets, num_heads) if time_buckets else None

    def forward(self, states: Tensor, allowed: Tensor, distance: Tensor, buckets: Tensor | None) -> Tensor:
        """Return new states ``(B, T, d)``.

        Args:
            states: ``(B, T, d)``.
            allowed: ``(B, 1, T, T)`` bool, which positions attend to which.
            distance: ``(T, T)`` int64, number of items between two positions.
            buckets: ``(B, T, T)`` int64, bucket of the difference of time; ``None``: no bias by time.
        """
        gate, value, query, key = F.silu(self.expand(self.input_norm(states))).chunk(4, -1)
        query, key, value = (part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) + self.position_bias(distance).permute(2, 0, 1)
        if self.time_bias is not None and buckets is not None:
            scores = scores + cast("Tensor", _BucketBias.apply(self.time_bias.weight, buckets))  # type: ignore[no-untyped-call]
        found = F.silu(scores).masked_fill(~allowed, 0) @ value / self.max_length
        result: Tensor = states + self.dropout(self.output(self.attention_norm(found.transpose(1, 2).flatten(2)) * gate))
        return result


class _BucketBias(torch.autograd.Function):
    """Bias of each pair of positions by its bucket; the gradient of a table with few rows is faster as a sum for each bucket than as an embedding."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, buckets: Tensor) -> Tensor:
        """Return the bias ``(B, H, T, T)`` of buckets ``(B, T, T)`` from a table ``(buckets, H)``."""
        ctx.save_for_backward(buckets)
        ctx.rows = len(table)
        return torch.stack([column[buckets] for column in table.unbind(1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the table."""
        (buckets,) = ctx.saved_tensors
        index = buckets.flatten()
        sums = [_sum_by_bucket(index, part.flatten(), ctx.rows) for part in gradient.unbind(1)]
        return torch.stack(sums, 1).to(gradient.dtype), None


def _sum_by_bucket(index: Tensor, values: Tensor, count: int) -> Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index, values, count)
    # `bincount` would synchronise on other devices.
    return values.new_zeros(count).index_add_(0, index, values)


def time_buckets(times: Tensor, count: int) -> Tensor:
    """Return the bucket of the difference of time of two positions, logarithmic in the difference.

    Args:
        times: ``(B, T)`` float64.
        count: Number of buckets; the last one has all larger differences.

    Returns:
        ``(B, T, T)`` int64.
    """
    difference = (times[:, :, None] - times[:, None, :]).abs().clamp_min(1.0)
    return (difference.float().log() / TIME_BASE).long().clamp_max(count - 1)
