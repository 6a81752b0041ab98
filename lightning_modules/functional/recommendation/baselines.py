"""Counting recommenders: popularity, item neighbours, item transitions.

Counts are integers, which are exact in every precision of the Trainer.

Shapes: B rows, L history items, N items.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad


def count_items(counts: Tensor, items: Tensor) -> None:
    """Add the occurrences of ``items`` to ``counts`` in place.

    Args:
        counts: ``(N,)``.
        items: Items of any shape; negative ones are padding.
    """
    real = items[items >= 0]
    counts.index_add_(0, real, torch.ones_like(real, dtype=counts.dtype))


def count_pairs(table: Tensor, first: Tensor, second: Tensor) -> None:
    """Add pairs of items to ``table``, in place.

    Args:
        table: ``(N, N)`` contiguous; the row is the first item, the column the second one.
        first: Items of any shape; negative ones are padding.
        second: Items of a shape that broadcasts with ``first``.
    """
    real = (first >= 0) & (second >= 0)
    cells = (first * len(table) + second)[real]
    table.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=table.dtype))


def cosine_similarity(pairs: Tensor, counts: Tensor) -> Tensor:
    """Compute the cosine similarity of items, whose vectors have an entry for each user; the diagonal is 0.

    Args:
        pairs: ``(N, N)``, number of users with both items; each pair is counted once, in either order.
        counts: ``(N,)``, number of users with the item.

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
        last: Number of last items that are used.

    Returns:
        ``(B, N)``.
    """
    recent = history[:, -last:]
    if not recent.shape[1]:
        return similarity.new_zeros(len(history), similarity.shape[1])
    return embedding_bag(recent.clamp_min(0), similarity, mode="sum", per_sample_weights=(recent >= 0).to(similarity.dtype))


def transition_scores(transitions: Tensor, history: Tensor) -> Tensor:
    """Return how often each item followed the last item of each history.

    Args:
        transitions: ``(N, N)``; the row is the item, the column the next item.
        history: ``(B, L)``, padded with -1 on the left.

    Returns:
        ``(B, N)`` float32.
    """
    if not history.shape[1]:
        return torch.zeros(len(history), len(transitions), device=transitions.device)
    last = history[:, -1]
    return transitions[last.clamp_min(0)].float() * (last >= 0)[:, None]


def top_items(scores: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Select the k best items of each row; items of equal score are ordered by id.

    Args:
        scores: ``(B, N)``.
        k: Number of items.
        allowed: ``(B, N)`` bool, items that may be selected.

    Returns:
        Items ``(B, k)``, padded with -1 if fewer than k are allowed, and their scores ``(B, k)``, ``-inf`` for padding.
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
