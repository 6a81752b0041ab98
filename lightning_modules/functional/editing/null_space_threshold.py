"""Threshold of the null space: selection of the directions of a second moment that an edit may change."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ThresholdMode = Literal["absolute", "relative_to_max", "relative_energy", "rank"]


@dataclass
class Threshold:
    """Selection of the directions of a second moment that an edit may change.

    Attributes:
        mode: ``absolute`` retains eigenvalues below ``value``; ``relative_to_max`` eigenvalues below ``value`` times the largest one;
            ``relative_energy`` the smallest eigenvalues as long as their sum is at most ``value`` times the sum of all eigenvalues; ``rank`` the
            ``value`` smallest eigenvalues.
        value: See ``mode``. With ``absolute``, the second moment is a mean over tokens, not a sum.

    Raises:
        ValueError: If ``mode`` is unknown or ``value`` is out of range.

    Source:
        Fang et al. (2025), AlphaEdit, arXiv:2410.02355, section 3.2 (1e-2; 2e-2 in the authors' code).
        Differs: modes other than ``absolute`` are added.
    """

    mode: ThresholdMode = "absolute"
    value: float = 2e-2

    def __post_init__(self) -> None:
        """Check the values."""
        if self.mode not in get_args(ThresholdMode):
            raise ValueError(f"threshold.mode must be one of {', '.join(get_args(ThresholdMode))}, got {self.mode!r}")
        if self.value <= 0:
            raise ValueError(f"threshold.value must be > 0, got {self.value}")
        if self.mode == "relative_energy" and self.value > 1:
            raise ValueError(f"with threshold.mode relative_energy, threshold.value is a share of the eigenvalues' sum, at most 1, got {self.value}")
        if self.mode == "rank" and self.value != int(self.value):
            raise ValueError(f"with threshold.mode rank, threshold.value must be an integer, the number of directions, got {self.value}")

    def retained(self, values: Tensor) -> int:
        """Return the number of retained directions, m.

        Args:
            values: ``(d,)`` eigenvalues in ascending order.

        Raises:
            ValueError: If no direction is retained.
        """
        if self.mode == "absolute":
            retained = values < self.value
        elif self.mode == "relative_to_max":
            retained = values < self.value * values[-1]
        elif self.mode == "relative_energy":
            retained = values.cumsum(0) <= self.value * values.sum()
        else:
            retained = torch.arange(len(values)) < self.value
        number = int(retained.sum())
        if not number:
            raise ValueError(
                f"threshold {self.mode} {self.value:g} retains none of {len(values)} directions (their eigenvalues are between {values[0]:.3g} and "
                f"{values[-1]:.3g}): no edit is possible; increase threshold.value, or use another mode"
            )
        if number == len(values):
            log.warning("threshold %s %g retains all %s directions: edits are not restricted; lower threshold.value", self.mode, self.value, number)
        return number
