"""Draws that depend on a row alone: the same negatives and candidates whatever the number of workers or devices."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import accumulate


class ItemSampler:
    """Draws items without replacement, uniformly or in proportion to weights.

    Args:
        items: Items to draw from.
        weights: Weight of each of them, >= 0; ``None`` draws uniformly, and so do weights that are all 0.
        seed: Seed; a draw depends on it and on the row alone.
    """

    def __init__(self, items: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.items = items
        self.weights = weights if weights is not None and any(weights) else None
        self.cumulative = None if self.weights is None else list(accumulate(self.weights))
        self.seed = seed

    def among(self, items: Sequence[int]) -> ItemSampler:
        """Return the sampler that draws from these items only; it takes items that are numbered from 0."""
        return ItemSampler(items, None if self.weights is None else [self.weights[item] for item in items], self.seed)

    def draw(self, sample_id: int, count: int, exclude: Collection[int]) -> list[int]:
        """Draw distinct items for a row.

        Args:
            sample_id: The row.
            count: Number of items.
            exclude: Items not to be drawn.

        Raises:
            ValueError: If fewer than ``count`` items may be drawn.
        """
        rng = self._rng(sample_id)
        taken = set(exclude)
        drawn: list[int] = []
        # Rejection is fast while most items may be drawn; the list of the rest is made only when it does not come to an end.
        for _ in range(16 * count + 64):
            if len(drawn) == count:
                return drawn
            item = self._one(rng)
            if item not in taken:
                taken.add(item)
                drawn.append(item)
        weights = self.weights if self.weights is not None else [1.0] * len(self.items)
        rest = [item for item, weight in zip(self.items, weights, strict=True) if weight > 0 and item not in taken]
        if len(rest) < count - len(drawn):
            raise ValueError(
                f"row {sample_id} needs {count} items besides its own {len(set(exclude))}, but only {len(drawn) + len(rest)} exist; ask for fewer"
            )
        return drawn + rng.sample(rest, count - len(drawn))

    def place(self, sample_id: int, count: int) -> int:
        """Draw a position below ``count`` for a row."""
        return int(self._rng(sample_id, stream=1).random() * count)

    def _rng(self, sample_id: int, stream: int = 0) -> random.Random:
        return random.Random((((self.seed & 0xFFFFFFFF) << 64) + (sample_id & 0xFFFFFFFFFFFFFFFF)) * 2 + stream)

    def _one(self, rng: random.Random) -> int:
        if self.cumulative is None:
            return self.items[int(rng.random() * len(self.items))]
        return rng.choices(self.items, cum_weights=self.cumulative)[0]
