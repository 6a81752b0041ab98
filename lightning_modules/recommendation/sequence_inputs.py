"""Inputs of sequence encoders from batches, and the negatives of their positions.

Shapes: B rows, T positions of a row, P positions with a target, k negatives of a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.datamodules.batch import RankedRows, SequenceBatch
from malleable.lightning_modules.functional.keyed_random import keyed_uniform, mix
from malleable.lightning_modules.functional.recommendation.item_draws import EarlierItems, ItemProposal
from malleable.lightning_modules.functional.recommendation.sequence_layout import SequenceLayout
from malleable.lightning_modules.losses.ranking import Negatives

PART_ROWS = 32  # number of rows of similar length that are encoded together on a CPU


def as_query(batch: RankedRows) -> SequenceBatch:
    """Return the histories and targets of a batch as sequences to rank items for; a :class:`SequenceBatch` is returned unchanged."""
    if isinstance(batch, SequenceBatch):
        return batch
    history = batch.history if batch.history.shape[1] else batch.history.new_full((len(batch), 1), -1)
    targets = torch.full_like(history, -1)
    targets[:, -1] = batch.target
    width = history.shape[1]
    return SequenceBatch(
        sample_id=batch.sample_id,
        item_ids=history,
        targets=targets,
        document_ids=None,
        supervised=torch.arange(1, len(history) + 1, device=history.device) * width - 1,
        seen=batch.seen,
        candidates=batch.candidates,
        metric_history=batch.metric_history,
        num_sequences=len(history),
        longest=width,
        is_query=True,
    )


def check_items(batch: RankedRows, num_items: int, num_behaviors: int = 0) -> None:
    """Check that the items and the types of interactions of a batch exist.

    On accelerators, the error has no details, because reading them would synchronise.

    Args:
        batch: Rows.
        num_items: Number of items of the catalogue.
        num_behaviors: Number of types of interactions.

    Raises:
        ValueError: If an item or a type is out of range.
    """
    targets = batch.targets if isinstance(batch, SequenceBatch) else batch.target[:, None]
    wrong = (torch.cat([batch.history, targets], 1) >= num_items).any(1)
    if wrong.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"an item is not in the catalogue of {num_items} items")
        return
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"item {int(torch.cat([batch.history[row], targets[row]]).max())} in the row with sample_id {int(batch.sample_id[row])} is not in the "
            f"catalogue of {num_items} items, which have the numbers 0 to {num_items - 1}; give the module the catalogue of the data"
        )
    if isinstance(batch, SequenceBatch) and batch.behaviors is not None and (largest := int(batch.behaviors.max())) >= num_behaviors:
        raise ValueError(
            f"`behaviors` has the type {largest}, but the module has {num_behaviors} types of interactions; give "
            "SequentialRecommender(behaviors=...) the names of all types, or leave the field out"
        )


def shorten(batch: SequenceBatch, max_length: int) -> SequenceBatch:
    """Return rows to rank items for with their last ``max_length`` items."""
    if batch.item_ids.shape[1] <= max_length:
        return batch
    kept = {name: getattr(batch, name)[:, -max_length:] for name in ("item_ids", "targets", "times", "behaviors") if getattr(batch, name) is not None}
    rows = torch.arange(1, len(batch) + 1, device=batch.item_ids.device)
    longest = None if batch.longest is None else min(batch.longest, max_length)
    return batch.replace(**kept, supervised=rows * max_length - 1, longest=longest)


def split_by_length(batch: SequenceBatch) -> tuple[list[SequenceBatch], Tensor]:
    """Split rows to rank items for into parts of similar length without the padding of all rows; on accelerators, return one part.

    Args:
        batch: Rows, padded on the left.

    Returns:
        The parts, and for each row of ``batch`` its position in the concatenated parts, ``(B,)``.
    """
    rows = torch.arange(len(batch), device=batch.item_ids.device)
    if batch.item_ids.device.type != "cpu" or len(batch) <= PART_ROWS:
        return [batch], rows
    lengths = (batch.item_ids >= 0).sum(1)
    order = lengths.argsort(stable=True)
    parts = []
    for own in torch.split(order, PART_ROWS):
        width = max(1, int(lengths[own].max()))
        columns = {
            name: getattr(batch, name)[own, -width:] for name in ("item_ids", "targets", "times", "behaviors") if getattr(batch, name) is not None
        }
        parts.append(batch.replace(**columns, sample_id=batch.sample_id[own], supervised=None, num_sequences=len(own), longest=width))
    return parts, order.argsort()


def last_only(batch: SequenceBatch) -> Tensor:
    """Return the last position of each row, ``(B, T)`` bool."""
    marks = torch.zeros_like(batch.item_ids, dtype=torch.bool)
    marks[:, -1] = True
    return marks


def append_hidden(batch: SequenceBatch) -> SequenceBatch:
    """Return rows to rank items for with one more position, whose item is the target; encoders hide it."""
    item = batch.targets[:, -1:].clamp_min(0)
    columns = {"item_ids": torch.cat([batch.item_ids, item], 1), "targets": F.pad(batch.targets, (1, 0), value=-1)}
    if batch.times is not None:
        columns["times"] = torch.cat([batch.times, batch.times[:, -1:]], 1)
    if batch.behaviors is not None:
        columns["behaviors"] = F.pad(batch.behaviors, (0, 1), value=-1)
    rows = torch.arange(1, len(batch) + 1, device=item.device)
    longest = None if batch.longest is None else batch.longest + 1
    return batch.replace(**columns, supervised=rows * (batch.item_ids.shape[1] + 1) - 1, longest=longest)


def layout_of(batch: SequenceBatch) -> SequenceLayout:
    """Return the sequences that the positions of a batch belong to."""
    document = (batch.item_ids >= 0).long() if batch.document_ids is None else batch.document_ids
    return SequenceLayout.of(document, batch.num_sequences, batch.longest)


def position_keys(batch: SequenceBatch, layout: SequenceLayout, seed: int, epoch: int) -> Tensor:
    """Return a key for each position, ``(B, T)`` int64.

    It depends on the seed, the epoch, the ``sample_id``, the number of the sequence in the row and the position in the sequence, but not on padding.
    """
    key = mix(batch.sample_id * 2_654_435_761 + (seed * 1_000_003 + epoch))
    return mix(mix(key)[:, None] + layout.document) + layout.position


def hidden_items(batch: SequenceBatch, seed: int, epoch: int, rate: float, last_rate: float) -> Tensor:
    """Return which items of training rows are hidden; only targets of the rows are.

    Args:
        batch: Training rows.
        seed: Seed of the choice, see :func:`position_keys`.
        epoch: Number of the epoch.
        rate: Probability that a target is hidden.
        last_rate: Probability that only the last target of a sequence is hidden, as in rows to rank items for.

    Returns:
        ``(B, T)`` bool.
    """
    layout = layout_of(batch)
    keys = position_keys(batch, layout, seed, epoch)
    # The next item of position t - 1 is the item at position t.
    is_target = F.pad(batch.targets[:, :-1] >= 0, (1, 0), value=False)
    is_last = F.pad(layout.document[:, 1:] != layout.document[:, :-1], (0, 1), value=True)
    zero, one = (torch.full((), value, dtype=torch.long, device=keys.device) for value in (0, 1))
    only_last = keyed_uniform(keys - layout.position, one) < last_rate
    return is_target & torch.where(only_last, is_last, keyed_uniform(keys, zero) < rate)


class PositionNegatives:
    """Negatives of the positions with a target.

    Args:
        proposal: Distribution of the negatives.
        count: Number of negatives of a position, k.
        batch: Rows.
        layout: Sequences of the positions.
        keys: ``(B, T)`` int64, key of each position.
        index: ``(P,)`` positions with a target, as indices of the flattened rows.
    """

    def __init__(self, proposal: ItemProposal, count: int, batch: SequenceBatch, layout: SequenceLayout, keys: Tensor, index: Tensor) -> None:
        self.proposal = proposal
        self.count = count
        sequence = layout.sequence_number()
        self._earlier = EarlierItems(batch.item_ids, sequence, layout.position, proposal.num_items)
        self._keys, self._sequence, self._position, self._target = (
            part.flatten()[index] for part in (keys, sequence, layout.position, batch.targets)
        )

    def __call__(self, rows: slice) -> Negatives:
        """Return the negatives of the positions of a slice."""
        items = self.proposal.draw(self._keys[rows], self.count)
        is_target = items == self._target[rows, None]
        earlier = self._earlier.contains(self._sequence[rows], self._position[rows], items) | is_target
        expected = self.proposal.log_prob(items) + math.log(self.count)
        return Negatives(items, expected, earlier, is_target)
