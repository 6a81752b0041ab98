"""Order-independent hash of a set of rows.

It is the same for the same rows in any order, in any batches and on any number of devices.

Shapes: B rows, L entries of a field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malleable.lightning_modules.functional.keyed_random import mix


def hash_rows(sample_id: Tensor, fields: Sequence[Tensor | None]) -> Tensor:
    """Return the number of rows of a batch and the sum of their hashes; results of several batches or ranks are added.

    Args:
        sample_id: ``(B,)``; rows with a negative id are padding and are not counted.
        fields: Content of the rows, ``(B, L)`` int64 each, with entries >= 0 in order and negative padding anywhere; ``None`` for a field that the
            rows do not have.

    Returns:
        ``(2,)`` int64: number of rows, and sum of their hashes modulo 2**64.
    """
    row = torch.zeros_like(sample_id)
    for number, field in enumerate(fields):
        if field is None:
            continue
        real = field >= 0
        # Positions are counted from the right among real entries, so that padding does not change the hash.
        place = real.flip(1).cumsum(1).flip(1)
        hashes = mix(mix(field) + place * len(fields) + number)
        row = row + (hashes * real).sum(1)
    counts = sample_id >= 0
    return torch.stack([counts.sum(), (mix(row) * counts).sum()])
