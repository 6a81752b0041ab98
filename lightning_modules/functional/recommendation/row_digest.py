"""Digest of evaluated rows: the same for the same rows in any order, in any batches, on any number of devices.

Shapes: B rows, L entries of a field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malleable.lightning_modules.functional.keyed_random import mix


def digest_rows(sample_id: Tensor, fields: Sequence[Tensor | None]) -> Tensor:
    """Count the rows of a batch, and add up a hash of each; the sums of two batches, or of two ranks, are those of both.

    Args:
        sample_id: ``(B,)``; rows with a negative one only fill the batch and count for nothing.
        fields: What tells rows from each other, ``(B, L)`` int64 each, entries >= 0 in their order, padded with negative ones anywhere;
            ``None`` for a field that the rows do not have.

    Returns:
        ``(2,)`` int64: number of rows, and sum of hashes modulo 2**64.
    """
    row = torch.zeros_like(sample_id)
    for number, field in enumerate(fields):
        if field is None:
            continue
        real = field >= 0
        # Counted from the right among real entries, so that padding does not matter.
        place = real.flip(1).cumsum(1).flip(1)
        hashes = mix(mix(field) + place * len(fields) + number)
        row = row + (hashes * real).sum(1)
    counts = sample_id >= 0
    return torch.stack([counts.sum(), (mix(row) * counts).sum()])
