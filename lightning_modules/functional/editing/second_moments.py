"""Second moments of keys, accumulated over text, and their eigenvalues. A key is the input of an edited weight matrix at one token.

Shapes: N keys, d width of a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1 << 13  # number of keys that are multiplied in single precision before the sum in double precision


class SecondMoment:
    """Uncentred second moment of keys, ``mean k k^T``, accumulated in double precision.

    The keys of first tokens are hundreds of times longer than other keys. In single precision, their rounding errors would exceed the small
    eigenvalues of the sum.

    Args:
        width: d.
        device: Device of the sum.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(width, width, dtype=torch.double, device=device)
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add keys, ``(N, d)``."""
        for part in torch.split(keys, ROWS):
            part = part if part.dtype == torch.double else part.float()
            self.total += (part.T @ part).double()
        self.count += len(keys)

    def merge(self, other: SecondMoment) -> None:
        """Add the keys of another second moment."""
        self.total += other.total.to(self.total.device)
        self.count += other.count

    def mean(self) -> Tensor:
        """Return the mean, ``(d, d)``.

        Raises:
            ValueError: If there are no keys, or if a key is not finite.
        """
        if not self.count:
            raise ValueError("the second moment has no keys; add keys of at least one text")
        if not bool(self.total.diagonal().isfinite().all()):
            raise ValueError("the second moment has keys that are not finite: the model overflows in this precision; load it in float32")
        return (self.total + self.total.T) / (2 * self.count)


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a second moment.

    Attributes:
        values: ``(d,)``, in ascending order, >= 0.
        vectors: ``(d, d)``, as columns.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Decompose a symmetric matrix ``(d, d)``."""
        values, vectors = torch.linalg.eigh(moment)
        # Rounding can make zero eigenvalues negative.
        return cls(values.clamp_min(0), vectors)
