"""Vectors to search: their scores, and bounds of the rounding errors of matrix products.

Shapes: B queries, N vectors, d width, n vectors of a block, P pairs of a query and a vector.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["dot", "cosine", "l2"]

BLOCK_NUMBERS = 1 << 22  # numbers of vectors converted at once
ACCELERATOR_BLOCK_NUMBERS = 1 << 26
ROUNDING = 2.0**-24  # of float32


class VectorSpace:
    """Vectors, in a form in which the nearest ones have the largest inner products with a query, less a bias for ``l2``.

    Vectors must not be changed while this object is used. Those with numbers that are not finite are never found.

    Args:
        vectors: ``(N, d)``, any floating-point type.
        metric: ``dot``: inner product; ``cosine``: inner product of the vectors scaled to length 1; ``l2``: negative Euclidean distance.

    Attributes:
        usable: ``(N,)`` bool, vectors whose numbers are finite; ``None`` if all are.
        largest: Length of the longest vector in this form.

    Raises:
        ValueError: If the metric is unknown, or the vectors have another number of dimensions.
    """

    def __init__(self, vectors: Tensor, metric: Metric = "dot") -> None:
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}; got {metric!r}")
        if vectors.ndim != 2:
            raise ValueError(f"vectors must have the shape (N, d), got {tuple(vectors.shape)}")
        self.vectors, self.metric = vectors, metric
        self.usable: Tensor | None = None
        self._measure()
        if not bool(self.largest.isfinite()):
            self.usable = vectors.isfinite().all(1)
            self.vectors = vectors.masked_fill(~self.usable[:, None], 0)
            self._measure()

    def _measure(self) -> None:
        """Set :attr:`largest`, and the centre of the vectors for ``l2``."""
        vectors = self.vectors
        # A common offset, which is large for hidden states, does not change distances, but reduces the precision of the product.
        self.centre = vectors.mean(0, dtype=torch.float32) if self.metric == "l2" and len(vectors) else None
        parts = torch.split(vectors, numbers_at_once(vectors) // max(1, vectors.shape[1]) + 1)
        self.largest = torch.stack([self.form(part).norm(dim=1).amax() if len(part) else vectors.new_zeros(()).float() for part in parts]).amax()

    def form(self, rows: Tensor) -> Tensor:
        """Return vectors or queries ``(n, d)`` in float32, scaled for ``cosine`` and centred for ``l2``."""
        if self.metric == "cosine":
            return unit_rows(rows)
        return rows.float() if self.centre is None else rows.float() - self.centre

    def products(self, vectors: Tensor, queries: Tensor, out: Tensor) -> None:
        """Compute the inner products, less the bias, with one matrix product.

        Args:
            vectors: ``(n, d)`` in the form of :meth:`form`.
            queries: ``(d, B)`` in this form.
            out: ``(n, B)`` float32, is overwritten.
        """
        if self.metric == "l2":
            torch.addmm(vectors.square().sum(1, keepdim=True) / -2, vectors, queries, out=out)
        else:
            torch.mm(vectors, queries, out=out)

    def scores(self, queries: Tensor, rows: Tensor, items: Tensor) -> Tensor:
        """Compute the scores of pairs one by one in float64. They do not depend on the other pairs or on the device, except for rounding in float64.

        Args:
            queries: ``(B, d)`` as they were given.
            rows: ``(P,)`` int64, the query of each pair.
            items: ``(P,)`` int64, the vector of each pair.

        Returns:
            ``(P,)`` float32.
        """
        size = numbers_at_once(queries) // max(1, queries.shape[1]) + 1
        wide = wide_dtype(queries)
        scores = []
        for own, other in zip(torch.split(rows, size), torch.split(items, size), strict=True):
            left, right = queries[own], self.vectors[other]
            if self.metric == "l2":
                scores.append(-(left.to(wide) - right.to(wide)).square().sum(1).sqrt().float())
            else:
                left, right = (unit_rows(left), unit_rows(right)) if self.metric == "cosine" else (left, right)
                scores.append((left.to(wide) * right.to(wide)).sum(1).float())
        return torch.cat(scores)

    def errors(self, queries: Tensor) -> Tensor:
        """Return a bound of the rounding error of :meth:`products` for each query, ``(B,)``, in float64 where the device has it.

        Args:
            queries: ``(B, d)`` in the form of :meth:`form`.
        """
        # A sum of d products in any order has an error of at most d roundings; 8 more for conversions, centring, the bias and the scores themselves.
        length = queries.norm(dim=1).to(wide_dtype(queries))
        square = (length + self.largest).square() if self.metric == "l2" else length * self.largest
        bound: Tensor = (queries.shape[1] + 8) * ROUNDING * square
        return bound

    def product_of(self, scores: Tensor, queries: Tensor) -> Tensor:
        """Return the inner product, less the bias, that belongs to a score, rounded down by the rounding of scores to float32.

        Args:
            scores: ``(B,)`` float32.
            queries: ``(B, d)`` in the form of :meth:`form`.
        """
        scores = scores.clamp(max=torch.finfo(torch.float32).max).to(wide_dtype(queries))
        scores = scores - 2 * ROUNDING * scores.abs()
        if self.metric != "l2":
            return scores
        return (queries.to(scores.dtype).square().sum(1) - scores.square()) / 2


def unit_rows(rows: Tensor) -> Tensor:
    """Scale the rows of ``(N, d)`` to length 1, in float32. Rows of zeros are not changed, and squares do not overflow."""
    wide = rows.to(wide_dtype(rows))
    length: Tensor = wide.norm(dim=-1, keepdim=True)
    return (wide / length.clamp(min=torch.finfo(wide.dtype).tiny)).float()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def numbers_at_once(tensor: Tensor) -> int:
    """Return how many numbers of vectors are converted at once."""
    return BLOCK_NUMBERS if tensor.device.type == "cpu" else ACCELERATOR_BLOCK_NUMBERS
