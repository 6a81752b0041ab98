"""EASE: item weights of a linear autoencoder in closed form.

Shapes: N items.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024


def ease_weights(gram: Tensor, l2: float, block: int = BLOCK) -> Tensor:
    """Compute the weights of a linear autoencoder whose diagonal is 0: ``B = I - P diag(P)^-1`` with ``P = (G + l2 I)^-1``.

    Args:
        gram: ``(N, N)`` symmetric, number of users with both items; the diagonal is the number of users with the item. Its memory is reused, so it
            must not be used afterwards.
        l2: Regularisation, > 0.
        block: Number of rows that are inverted at once.

    Returns:
        ``(N, N)`` in the memory of ``gram``; the score of item j is the sum of ``B[i, j]`` over the items i of a user.

    Source:
        Steck (2019), Embarrassingly Shallow Autoencoders for Sparse Data, arXiv:1905.03375, equation (8).
        Differs: the inverse is computed in place, block by block, so that the peak memory is that of one table and of two stripes.
    """
    gram.diagonal().add_(l2)
    invert_in_place(gram, block)
    diagonal = gram.diagonal().clone()
    gram.div_(-diagonal)
    gram.fill_diagonal_(0)
    return gram


def invert_in_place(matrix: Tensor, block: int = BLOCK) -> None:
    """Invert a symmetric positive definite matrix in place by block elimination.

    Args:
        matrix: ``(N, N)``.
        block: Number of rows that are eliminated at once.

    Raises:
        ValueError: If the matrix is not positive definite.
    """
    for start in range(0, len(matrix), block):
        own = slice(start, min(start + block, len(matrix)))
        factor, failed = torch.linalg.cholesky_ex(matrix[own, own])
        if bool(failed):
            raise ValueError("the matrix is not positive definite; increase l2")
        pivot = torch.cholesky_inverse(factor)
        stripe = matrix[own].clone()
        stripe[:, own] = 0
        scaled = pivot @ stripe
        matrix[:, own] = 0
        column = stripe.T.contiguous()
        # The eliminated rows have the opposite sign in their columns, because the sweep is not symmetric in them.
        column[:start] *= -1
        matrix.addmm_(column, scaled, alpha=-1)
        matrix[own] = scaled
        matrix[:, own] = -(column @ pivot)
        matrix[own, own] = pivot
