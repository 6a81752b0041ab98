"""Projection of keys onto the null space: the directions that a threshold retains.

The threshold is in :mod:`~malleable.lightning_modules.functional.editing.null_space_threshold`.

Shapes: N keys, d width of a key, m retained directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malleable.lightning_modules.functional.editing.second_moments import Spectrum


class NullSpace:
    """Projector ``P`` onto the retained directions, stored as a basis of these or of their complement, whichever is smaller.

    Args:
        spectrum: Spectrum of the second moment of keys.
        retained: m.
    """

    def __init__(self, spectrum: Spectrum, retained: int) -> None:
        width = len(spectrum.values)
        self.retained = retained
        self.complement = 2 * retained > width
        self.basis = (spectrum.vectors[:, retained:] if self.complement else spectrum.vectors[:, :retained]).contiguous()

    def project(self, keys: Tensor) -> Tensor:
        """Project keys ``(N, d)``; return ``(N, d)``."""
        basis = self.basis.to(keys.dtype)
        inside = keys @ basis @ basis.T
        return keys - inside if self.complement else inside

    def dense(self) -> Tensor:
        """Return the projector as a matrix, ``(d, d)``."""
        return self.project(torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device))
