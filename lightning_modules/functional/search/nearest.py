"""Exact search for the nearest vectors.

The first pass computes scores by matrix products in float32, block by block, and keeps some more candidates than needed. The last bits of such scores
depend on the shape of the block. Therefore the candidates are scored again in float64, one by one. A bound of the rounding error shows for which
queries a vector that was not kept could belong to the result; these few queries are searched a second time.

Shapes: B queries, N vectors, d width, k results, n vectors of a block, P pairs of a query and a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.functional.precision import exact_products, full_precision
from malleable.lightning_modules.functional.search.vector_space import Metric, VectorSpace, numbers_at_once

GROUP = 16  # vectors of which first only the largest score is compared
SLACK = 8  # additional candidates of the first pass
# Scores of a block: 8 MiB fit the cache of a CPU. Several threads wait for each other less often if blocks are larger.
SCORES, THREADED_SCORES, ACCELERATOR_SCORES = 1 << 21, 1 << 23, 1 << 26
QUERIES, ACCELERATOR_QUERIES = 1 << 10, 1 << 12  # queries of a matrix product

FirstPass = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Function of queries ``(B, d)``, in the form of the space, and a number K. It returns the vectors with the largest inner products, less the bias:
positions ``(B, K)``, padded with -1, and these products ``(B, K)``, largest first, padded with ``-inf``."""


class Neighbours(NamedTuple):
    """The nearest vectors of each query.

    Attributes:
        items: ``(B, k)`` int64, positions of the vectors, nearest first, padded with -1.
        scores: ``(B, k)`` float32, ``-inf`` for padding.
    """

    items: Tensor
    scores: Tensor


def nearest(
    queries: Tensor,
    vectors: Tensor,
    k: int,
    *,
    metric: Metric = "dot",
    allowed: Tensor | None = None,
    exclude: Tensor | None = None,
    block: int | None = None,
) -> Neighbours:
    """Find the k nearest vectors of each query; see :func:`search_space`.

    Args:
        queries: ``(B, d)``.
        vectors: ``(N, d)`` on the same device.
        k: Number of results of each query.
        metric: ``dot``: inner product; ``cosine``: inner product of the vectors scaled to length 1; ``l2``: negative Euclidean distance.
        allowed: ``(N,)`` or ``(B, N)`` bool, vectors that may be returned; ``None`` allows all.
        exclude: ``(B, E)`` int64, positions that are not returned, padded with -1.
        block: Number of vectors of a matrix product. Default: chosen by the device. The result is the same for each.

    Raises:
        ValueError: If ``metric`` is unknown, ``k`` or ``block`` is below 1, a shape does not fit, or ``exclude`` has a position that does not exist.
    """
    return search_space(VectorSpace(vectors, metric), queries, k, allowed=allowed, exclude=exclude, block=block)


@full_precision
@torch.no_grad()
def search_space(
    space: VectorSpace,
    queries: Tensor,
    k: int,
    *,
    allowed: Tensor | None = None,
    exclude: Tensor | None = None,
    block: int | None = None,
    first_pass: FirstPass | None = None,
) -> Neighbours:
    """Find the k nearest vectors of each query.

    The result is that of a stable sort of all scores, computed in float64 and rounded to float32: of equal scores, that of the lower position comes
    first. It does not depend on blocks, the other queries or the device. Queries with numbers that are not finite have no neighbours.

    Args:
        space: The vectors, on the device of the queries.
        queries: ``(B, d)``.
        k: Number of results of each query.
        allowed: ``(N,)`` or ``(B, N)`` bool, vectors that may be returned; ``None`` allows all.
        exclude: ``(B, E)`` int64, positions that are not returned, padded with -1.
        block: Number of vectors of a matrix product. Default: chosen by the device.
        first_pass: Replaces the first pass if nothing is excluded.

    Raises:
        ValueError: If ``k`` or ``block`` is below 1, a shape does not fit, or ``exclude`` has a position that does not exist.
    """
    count = len(space.vectors)
    _check(space, queries, k, allowed, exclude, block)
    if space.usable is not None:
        allowed = space.usable if allowed is None else allowed & space.usable
    usable = queries.isfinite().all(1)
    queries = queries.masked_fill(~usable[:, None], 0)
    items = torch.full((len(queries), k), -1, device=queries.device)
    scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
    size = QUERIES if queries.device.type == "cpu" else ACCELERATOR_QUERIES
    width = min(k, count)
    with exact_products():
        for start in range(0, len(queries) if count else 0, size):
            rows = slice(start, start + size)
            search = _Search(space, queries[rows], _rows(allowed, rows), None if exclude is None else exclude[rows], block)
            found = search.run(width, first_pass if allowed is None and exclude is None else None)
            items[rows, :width], scores[rows, :width] = found
    return Neighbours(items.masked_fill(~usable[:, None], -1), scores.masked_fill(~usable[:, None], -torch.inf))


class _Search:
    """Search for the nearest vectors of some queries; the arguments are those of :func:`search_space`."""

    def __init__(self, space: VectorSpace, queries: Tensor, allowed: Tensor | None, exclude: Tensor | None, block: int | None) -> None:
        self.space, self.queries, self.allowed, self.exclude, self.given_block = space, queries, allowed, exclude, block
        fitting = min(_scores_at_once(queries) // len(queries), 4 * numbers_at_once(queries) // max(1, queries.shape[1]))
        self.block = block or max(GROUP, fitting // GROUP * GROUP)
        self.formed = space.form(queries)
        self.error = space.errors(self.formed)

    def run(self, k: int, first_pass: FirstPass | None) -> Neighbours:
        """Return positions and scores ``(B, k)``."""
        keep = k + max(SLACK, k // 4)
        items, products = self.candidates(keep) if first_pass is None else first_pass(self.formed, keep)
        # By position, so that the stable sort of the selection leaves the lower one of equal scores first.
        items = items.sort(1).values
        rows, columns = (items >= 0).nonzero(as_tuple=True)
        found = _select(rows, items[rows, columns], self.space.scores(self.queries, rows, items[rows, columns]), len(items), k)
        lowest, last = products[:, -1], self.space.product_of(found.scores[:, -1], self.formed)
        # Others have products of at most `lowest`. Products without an error are those of queries of zeros.
        clear = (lowest + self.error < last) | (lowest == -torch.inf) | (self.error == 0)
        unclear = (~clear).nonzero()[:, 0]
        if len(unclear):
            exclude = None if self.exclude is None else self.exclude[unclear]
            again = _Search(self.space, self.queries[unclear], _rows(self.allowed, unclear), exclude, self.given_block)
            for whole, part in zip(found, again.above_product(last[unclear], k), strict=True):
                whole[unclear] = part
        return found

    def candidates(self, keep: int) -> Neighbours:
        """Return the vectors with the largest products, and these products, both ``(B, keep)``."""
        count, device = len(self.queries), self.queries.device
        best = Neighbours(torch.full((count, keep), -1, device=device), torch.full((count, keep), -torch.inf, device=device))
        threshold = best.scores[:, -1].clone()
        own = torch.arange(count, device=device).repeat_interleave(keep)
        pending: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in self.pairs(threshold, keep):
            pending.append(part)
            # Sorting is cheap if it is rare. In a random order of vectors, the threshold hardly changes between two blocks.
            if sum(len(rows) for rows, _, _ in pending) > count * keep:
                best = _select(*_joined((own, best.items.flatten(), best.scores.flatten()), *pending), count, keep)
                threshold.copy_(best.scores[:, -1])
                pending.clear()
        return _select(*_joined((own, best.items.flatten(), best.scores.flatten()), *pending), count, keep)

    def above_product(self, products: Tensor, k: int) -> Neighbours:
        """Return positions and scores ``(B, k)`` of the nearest vectors, all of which have at least the exact products ``(B,)``."""
        count = len(self.queries)
        rows = items = torch.empty(0, dtype=torch.long, device=self.queries.device)
        found = _select(rows, items, torch.empty(0, device=self.queries.device), count, k)
        threshold = (products - self.error).float().nextafter(self.formed.new_tensor(-torch.inf))  # also if it was rounded up
        for new_rows, new_items, _ in self.pairs(threshold):
            kept, columns = (found.items >= 0).nonzero(as_tuple=True)
            old = kept, found.items[kept, columns], found.scores[kept, columns]
            found = _select(*_joined(old, (new_rows, new_items, self.space.scores(self.queries, new_rows, new_items))), count, k)
        return found

    def pairs(self, threshold: Tensor, keep: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the pairs of a query and a vector whose product exceeds the threshold of the query, in the order of the vectors.

        Args:
            threshold: ``(B,)``; may be raised between two blocks.
            keep: If given, pairs that are not among the ``keep`` largest of a query in a block may be left out.

        Yields:
            Query, vector and product, ``(P,)`` each.
        """
        vectors, queries = self.space.vectors, self.formed.T.contiguous()
        mask = self.masking()
        buffer = queries.new_empty(-(-min(self.block, len(vectors)) // GROUP) * GROUP, len(self.queries))
        for start in range(0, len(vectors), self.block):
            part = self.space.form(vectors[start : start + self.block])
            products = buffer[: -(-len(part) // GROUP) * GROUP]
            self.space.products(part, queries, products[: len(part)])
            products[len(part) :] = -torch.inf
            mask(start, products[: len(part)])
            grouped = products.view(-1, GROUP, len(self.queries))
            peaks = grouped.amax(1)
            group, row = (peaks > threshold).nonzero(as_tuple=True)
            if keep is not None and keep < len(peaks) and len(group) > 2 * keep * len(self.queries):
                # The threshold excludes little, as in the first block. `keep` groups have a product that is larger than this one, or equal.
                lower = peaks.topk(keep, dim=0).values[-1].nextafter(threshold.new_tensor(-torch.inf))
                group, row = (peaks > lower.maximum(threshold)).nonzero(as_tuple=True)
            if len(group):
                values = grouped[group, :, row]
                pair, member = (values > threshold[row, None]).nonzero(as_tuple=True)
                yield row[pair], start + group[pair] * GROUP + member, values[pair, member]

    def masking(self) -> Callable[[int, Tensor], None]:
        """Return a function of a position and the products ``(n, B)`` from there, which sets those to ``-inf`` that may not be returned."""
        rows = items = torch.empty(0, dtype=torch.long, device=self.queries.device)
        ends: list[int] = []
        if self.exclude is not None:
            rows, columns = (self.exclude >= 0).nonzero(as_tuple=True)
            items, order = self.exclude[rows, columns].sort()
            rows = rows[order]
            ends = torch.searchsorted(items, torch.arange(0, len(self.space.vectors) + self.block, self.block, device=items.device)).tolist()

        def mask(start: int, products: Tensor) -> None:
            if self.allowed is not None:
                part = self.allowed[..., start : start + len(products)]
                products.masked_fill_(~(part[:, None] if part.ndim == 1 else part.T), -torch.inf)
            if ends:
                own = slice(*ends[start // self.block :][:2])
                products[items[own] - start, rows[own]] = -torch.inf

        return mask


def _select(rows: Tensor, items: Tensor, scores: Tensor, count: int, k: int) -> Neighbours:
    """Return the k pairs of each row with the largest scores, ``(count, k)``; of equal scores, those that come first.

    Args:
        rows: ``(P,)`` int64.
        items: ``(P,)`` int64.
        scores: ``(P,)``; pairs with ``-inf`` and not-a-number are left out.
        count: Number of rows.
        k: Number of pairs of each row.
    """
    real = (scores > -torch.inf).nonzero()[:, 0]
    order = real[scores[real].argsort(descending=True, stable=True)]
    order = order[rows[order].argsort(stable=True)]
    sizes = rows[order].bincount(minlength=count)
    rank = torch.arange(len(order), device=rows.device) - (sizes.cumsum(0) - sizes)[rows[order]]
    first = (rank < k).nonzero()[:, 0]
    rank, order = rank[first], order[first]
    best = Neighbours(items.new_full((count, k), -1), scores.new_full((count, k), -torch.inf))
    best.items[rows[order], rank], best.scores[rows[order], rank] = items[order], scores[order]
    return best


def _joined(*parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rows, items, scores = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(items), torch.cat(scores)


def _scores_at_once(queries: Tensor) -> int:
    """Return the number of scores of a block."""
    if queries.device.type != "cpu":
        return ACCELERATOR_SCORES
    return SCORES if torch.get_num_threads() == 1 else THREADED_SCORES


def _rows(allowed: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """Return the part of ``allowed`` for some queries."""
    return allowed[rows] if allowed is not None and allowed.ndim == 2 else allowed


def _check(space: VectorSpace, queries: Tensor, k: int, allowed: Tensor | None, exclude: Tensor | None, block: int | None) -> None:
    """Raise an error for arguments of :func:`search_space` that do not fit."""
    count, width = space.vectors.shape
    for name, value in (("k", k), ("block", block)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries must have the shape (B, {width}), as wide as the vectors; got {tuple(queries.shape)}")
    shapes = (count,), (len(queries), count)
    if allowed is not None and (allowed.dtype != torch.bool or tuple(allowed.shape) not in shapes):
        raise ValueError(f"allowed must be bool of shape {shapes[0]} or {shapes[1]}, got {allowed.dtype} of shape {tuple(allowed.shape)}")
    if exclude is None:
        return
    if exclude.dtype != torch.long or exclude.ndim != 2 or len(exclude) != len(queries):
        raise ValueError(f"exclude must be int64 of shape ({len(queries)}, E), got {exclude.dtype} of shape {tuple(exclude.shape)}")
    if not bool(((exclude >= -1) & (exclude < count)).all()):
        raise ValueError(f"exclude must contain positions from 0 to {count - 1}, or -1 for padding; got {exclude.min()} to {exclude.max()}")
