"""Recommenders that only count: popularity, item neighbours, next items.

Counts are integers: they stay exact whatever the precision of a run.

Shapes: B rows, L history items, N items.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad


def count_items(counts: Tensor, items: Tensor) -> None:
    """Add the occurrences of ``items`` (any shape, negative ones are padding) to ``counts``, ``(N,)``, in place."""
    kept = items[items >= 0]
    counts.index_add_(0, kept, torch.ones_like(kept, dtype=counts.dtype))


def count_pairs(table: Tensor, first: Tensor, second: Tensor) -> None:
    """Add pairs of items to ``table``, in place.

    Args:
        table: ``(N, N)`` contiguous; row is the first item, column the second.
        first: Items of any shape; negative ones are padding.
        second: Items that ``first`` broadcasts with.
    """
    kept = (first >= 0) & (second >= 0)
    cells = (first * len(table) + second)[kept]
    table.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=table.dtype))


def cosine_similarity(pairs: Tensor, counts: Tensor) -> Tensor:
    """Cosine of the items' user vectors, 0 on the diagonal.

    Args:
        pairs: ``(N, N)``, users who have both items, each pair counted once, in either order.
        counts: ``(N,)`` users who have the item.

    Returns:
        ``(N, N)`` float32, symmetric.

    Source:
        Sarwar et al. (2001), Item-based collaborative filtering recommendation algorithms, section 3.1.1.
    """
    scale = counts.clamp_min(1).float().rsqrt()
    return ((pairs + pairs.T).float() * scale[:, None] * scale).fill_diagonal_(0)


def neighbour_scores(similarity: Tensor, history: Tensor, last: int = 10) -> Tensor:
    """Sum the similarity to the last items of each history.

    Args:
        similarity: ``(N, N)``.
        history: ``(B, L)``, oldest first, padded with -1 on the left.
        last: Items of the history that count.

    Returns:
        ``(B, N)``.
    """
    recent = history[:, -last:]
    if not recent.shape[1]:
        return similarity.new_zeros(len(history), similarity.shape[1])
    return embedding_bag(recent.clamp_min(0), similarity, mode="sum", per_sample_weights=(recent >= 0).to(similarity.dtype))


def transition_scores(transitions: Tensor, history: Tensor) -> Tensor:
    """Count what came next after the last item of each history.

    Args:
        transitions: ``(N, N)``; row is the item, column the one after it.
        history: ``(B, L)``, padded with -1 on the left.

    Returns:
        ``(B, N)`` float32.
    """
    if not history.shape[1]:
        return torch.zeros(len(history), len(transitions), device=transitions.device)
    last = history[:, -1]
    return transitions[last.clamp_min(0)].float() * (last >= 0)[:, None]


def top_items(scores: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take the best items of each row; equal scores go by id.

    Args:
        scores: ``(B, N)``.
        k: Number of items.
        allowed: ``(B, N)`` bool, items that may be taken.

    Returns:
        Items ``(B, k)``, -1 where fewer than k may be taken, and their scores, ``-inf`` beside -1.
    """
    scores = scores.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True)
    items, values = best.indices[:, :k], best.values[:, :k]
    missing = k - items.shape[1]
    if missing > 0:
        items, values = pad(items, (0, missing)), pad(values, (0, missing), value=-torch.inf)
    return items.masked_fill(values == -torch.inf, -1), values
