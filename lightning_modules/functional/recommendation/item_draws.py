"""Negative items for training, drawn with random numbers that depend on a key only.

Shapes: P positions, k negatives of a position, N items, B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malleable.lightning_modules.functional.keyed_random import keyed_integers

_BITS = 53  # of a uniform number in float64


class ItemProposal:
    """Distribution that negative items are drawn from, with replacement.

    Args:
        num_items: N.
        weights: Weight of each item, >= 0; ``None`` is uniform.

    Raises:
        ValueError: If there is not one weight for each item, or if no weight is positive.
    """

    def __init__(self, num_items: int, weights: Sequence[float] | None = None) -> None:
        self.num_items = num_items
        self._cumulative: Tensor | None = None
        if weights is None:
            self._log_prob = torch.full((1,), 1 / num_items).log()
            return
        values = torch.as_tensor(weights, dtype=torch.float64)
        if len(values) != num_items or not bool((values > 0).any()):
            raise ValueError(f"expected a weight for each of {num_items} items, at least one of them > 0; got {len(values)} weights")
        probabilities = values / values.sum()
        self._cumulative = probabilities.cumsum(0) / probabilities.sum()
        self._log_prob = probabilities.float().log()

    def draw(self, seeds: Tensor, count: int) -> Tensor:
        """Draw ``count`` items for each seed.

        Args:
            seeds: ``(P,)`` int64; equal seeds give equal items.
            count: k.

        Returns:
            ``(P, k)`` int64.
        """
        number = torch.arange(count, device=seeds.device)
        if self._cumulative is None:
            return keyed_integers(seeds[:, None], number, self.num_items)
        self._cumulative = self._cumulative.to(seeds.device, non_blocking=True)
        uniform = keyed_integers(seeds[:, None], number, 1 << _BITS).double() * 2.0**-_BITS
        # The last item with a positive weight ends at 1, so that every number below 1 belongs to an item with a positive weight.
        return torch.searchsorted(self._cumulative, uniform, right=True).clamp_max(self.num_items - 1)

    def log_prob(self, items: Tensor) -> Tensor:
        """Return the logarithm of the probability of each item, of the shape of ``items``, float32."""
        self._log_prob = self._log_prob.to(items.device, non_blocking=True)
        return self._log_prob[0].expand(items.shape) if self._cumulative is None else self._log_prob[items]


class EarlierItems:
    """Lookup of the items of a sequence up to a position.

    Args:
        items: ``(B, T)`` int64, -1 at padding.
        sequence: ``(B, T)`` int64, number of the sequence of each position among all sequences of the batch; -1 at padding.
        position: ``(B, T)`` int64, number of the item in its sequence.
        num_items: N.
    """

    def __init__(self, items: Tensor, sequence: Tensor, position: Tensor, num_items: int) -> None:
        self.num_items = num_items
        keys = (sequence * num_items + items).masked_fill(items < 0, -1).flatten()
        # The first occurrence of an item comes first among equal keys.
        order = position.flatten().argsort(stable=True)
        order = order[keys[order].argsort(stable=True)]
        self.keys, self.first = keys[order], position.flatten()[order]

    def contains(self, sequence: Tensor, position: Tensor, items: Tensor) -> Tensor:
        """Return whether items are in a sequence at or before a position.

        Args:
            sequence: ``(P,)`` number of the sequence, >= 0.
            position: ``(P,)`` last position to look at.
            items: ``(P, k)``.

        Returns:
            ``(P, k)`` bool.
        """
        wanted = sequence[:, None] * self.num_items + items
        place = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        return (self.keys[place] == wanted) & (self.first[place] <= position[:, None])
