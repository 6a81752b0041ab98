"""Positions and attention masks of sequences in padded and packed rows.

Shapes: B rows, T positions of a row, S sequences of all rows, L items of the longest sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SequenceLayout(NamedTuple):
    """Sequences that the positions of a batch belong to.

    Attributes:
        document: ``(B, T)`` int64; 0 is padding, positions of a row with equal numbers belong to one sequence.
        position: ``(B, T)`` int64, number of the item in its sequence, from 0; 0 at padding.
        num_sequences: S, or an upper bound.
        longest: L, or an upper bound.
    """

    document: Tensor
    position: Tensor
    num_sequences: int
    longest: int

    @classmethod
    def of(cls, document: Tensor, num_sequences: int | None = None, longest: int | None = None) -> SequenceLayout:
        """Return the layout of sequences.

        Args:
            document: ``(B, T)``, as in the attribute.
            num_sequences: Upper bound of S; default: B times T.
            longest: Upper bound of L; default: T.
        """
        count, width = document.shape
        column = torch.arange(width, device=document.device)
        start = (column * _starts(document)).cummax(1).values
        position = (column - start).masked_fill(document == 0, 0)
        return cls(document, position, count * width if num_sequences is None else num_sequences, width if longest is None else longest)

    @property
    def real(self) -> Tensor:
        """Positions with an item, ``(B, T)`` bool."""
        return self.document > 0

    def attention_mask(self, causal: bool = True) -> Tensor:
        """Return which positions attend to which, ``(B, 1, T, T)`` bool. Padding attends to itself only, so that no row is empty.

        Args:
            causal: Attend to earlier positions of the sequence and the position itself; otherwise to the whole sequence.
        """
        width = self.document.shape[1]
        allowed = (self.document[:, :, None] == self.document[:, None, :]) & self.real[:, :, None]
        if causal:
            allowed &= torch.ones(width, width, dtype=torch.bool, device=self.document.device).tril()
        return (allowed | torch.eye(width, dtype=torch.bool, device=self.document.device))[:, None]

    def sequence_number(self) -> Tensor:
        """Return the number of the sequence of each position among all sequences of the batch, from 0, ``(B, T)``; -1 at padding."""
        starts = (_starts(self.document) & self.real).flatten()
        return (starts.long().cumsum(0) - 1).view_as(self.document).masked_fill(~self.real, -1)

    def unpack(self, states: Tensor) -> Tensor:
        """Return one row for each sequence, padded with zeros on the right, ``(S, L, d)``, of states ``(B, T, d)``."""
        table = states.new_zeros(self.num_sequences * self.longest + 1, states.shape[-1])
        table = table.index_copy(0, self._cells(), states.flatten(0, 1))
        return table[:-1].view(self.num_sequences, self.longest, -1)

    def pack(self, rows: Tensor) -> Tensor:
        """Return the states ``(B, T, d)`` of rows ``(S, L, d)``: the inverse of :meth:`unpack`; zeros at padding."""
        padded = torch.cat([rows.flatten(0, 1), rows.new_zeros(1, rows.shape[-1])])
        return padded[self._cells()].view(*self.document.shape, -1) * self.real[..., None]

    def _cells(self) -> Tensor:
        """Return the cell of each position in a flattened table ``(S, L)``; padding is in the additional last cell."""
        cells = self.sequence_number() * self.longest + self.position
        return cells.masked_fill(~self.real, self.num_sequences * self.longest).flatten()


def _starts(document: Tensor) -> Tensor:
    """Return the positions whose number differs from that of the previous position, ``(B, T)`` bool."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return starts
