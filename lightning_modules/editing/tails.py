"""Logits behind a change at one token of each row: of whole rows, or of their ends where all else can be computed once.

Shapes: B rows, P tokens before the changed ones, S tokens from them on, v width of the residual stream, V vocabulary, N logits asked for.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.passes import at_positions, replace_output, replaying, stopping
from malleable.lightning_modules.editing.prompts import Rows

log = logging.getLogger(__name__)

TOLERANCE = 1e-4


def follow(model: Any, layout: Layout, layer: int, rows: Rows) -> Tails | WholeRows:
    """Choose the cheapest exact way to run what follows a change.

    The ends of rows alone are run if that gives the logits of whole rows, which it does not where attention is limited to a
    window shorter than the row, goes by column instead of ``position_ids``, or where layers are recurrent.

    Args:
        model: A decoder in evaluation mode.
        layout: Names of its parts.
        layer: The block behind which the residual stream is changed.
        rows: The rows; ``position`` is the changed token.
    """
    try:
        tails = Tails(model, layout, layer, rows)
        if _exact(tails, model, layout, layer, rows):
            return tails
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.debug("the ends of rows cannot be run alone: %s", error)
    log.info("%s: whole rows are run, because their ends alone do not give the same logits", type(model).__name__)
    return WholeRows(model, layout, layer, rows)


@torch.no_grad()
def _exact(tails: Tails, model: Any, layout: Layout, layer: int, rows: Rows) -> bool:
    """Whether the ends of rows, all together, give the logits of whole rows behind a change.

    Compared are the longest row, the row with the longest end and the one with the shortest beginning: they reach farthest into a window, and are
    farthest from where they would be in a batch of their own.
    """
    lengths, before = rows.attention_mask.sum(1), rows.position
    shortest = torch.where(before > 0, before, before.max() + 1).argmin()
    chosen = torch.stack([lengths.argmax(), (lengths - before).argmax(), shortest])
    whole = WholeRows(model, layout, layer, rows.take(chosen))
    change = torch.zeros_like(tails.start, dtype=torch.float)
    change[chosen] = whole.start.float().roll(1, -1)
    last = (lengths - before)[chosen] - 1
    found = tails.logits(change, chosen, last).float()
    expected = whole.logits(change[chosen], torch.arange(len(chosen), device=chosen.device), last).float()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return bool(error.max() <= max(TOLERANCE, 8 * torch.finfo(whole.start.dtype).eps))


@torch.no_grad()
def _run_to(model: Any, layout: Layout, layer: int, rows: Rows) -> tuple[Tensor, Any]:
    """Run rows up to a block; return its output ``(B, T, v)`` and the other inputs of the next block."""
    with stopping(model, layout, layer, []) as seen:
        seen.run(**rows.inputs())
    assert seen.output is not None
    return seen.output, seen.rest


class WholeRows:
    """What follows in a decoder from a change of the residual stream behind a block, at one token of each row.

    Every pass runs the whole model over rows padded on the right, which is exact for every causal decoder.

    Args:
        model: A decoder in evaluation mode.
        layout: Names of its parts.
        layer: The block.
        rows: The rows; ``position`` is the changed token.

    Attributes:
        start: ``(B, v)`` the residual stream at the changed tokens, before the change.
    """

    def __init__(self, model: Any, layout: Layout, layer: int, rows: Rows) -> None:
        self.model, self.layout, self.layer, self.rows = model, layout, layer, rows
        hidden, _ = _run_to(model, layout, layer, rows)
        self.start = hidden[self._place(), rows.position]

    def _place(self) -> Tensor:
        """Number of each row."""
        return torch.arange(len(self.rows.position), device=self.rows.position.device)

    def take(self, chosen: Tensor) -> WholeRows:
        """Some of the rows."""
        part = object.__new__(WholeRows)
        part.model, part.layout, part.layer = self.model, self.layout, self.layer
        part.rows, part.start = self.rows.take(chosen), self.start[chosen]
        return part

    def logits(self, change: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Run what follows a change; as :meth:`Tails.logits`."""
        changed = self.start.float() + change

        def replace(hidden: Tensor) -> Tensor:
            return hidden.index_put((self._place(), self.rows.position), changed.to(hidden.dtype))

        with replace_output(self.model, self.layout, self.layer, replace), at_positions(self.model, rows, self.rows.position[rows] + tokens):
            logits: Tensor = self.model(**self.rows.inputs(), use_cache=False).logits[0]
        return logits


class Tails:
    """:class:`WholeRows` with passes over the ends of rows only, for decoders whose state is a cache of keys and values.

    Blocks up to that one run once, over all tokens; those above run once over the tokens before the changed one, whose keys and values are kept,
    and in every pass over the changed token and what follows it.

    Args:
        model: A decoder in evaluation mode.
        layout: Names of its parts.
        layer: The block.
        rows: The rows; ``position`` is the changed token.

    Attributes:
        start: ``(B, v)`` the residual stream at the changed tokens, before the change.
    """

    def __init__(self, model: Any, layout: Layout, layer: int, rows: Rows) -> None:
        self.model, self.layout, self.layer = model, layout, layer
        self.before = rows.position
        hidden, self.rest = _run_to(model, layout, layer, rows)
        lengths = rows.attention_mask.sum(1) - self.before
        column = torch.arange(int(lengths.max()), device=hidden.device)
        self.mask = column < lengths[:, None]
        place = (self.before[:, None] + column).clamp_max(hidden.shape[1] - 1)
        self.input_ids = rows.input_ids.gather(1, place)
        self.hidden = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        self.start = self.hidden[:, 0]
        self.memory = self._remember(rows, hidden)

    def _remember(self, rows: Rows, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the blocks above, for the tokens before the changed ones."""
        width = int(self.before.max())
        if width == 0:
            return []
        inputs = {"input_ids": rows.input_ids[:, :width], "attention_mask": rows.attention_mask[:, :width]}
        first = torch.zeros(1, dtype=torch.long, device=hidden.device)
        with torch.no_grad(), replaying(self.model, self.layout, self.layer, hidden[:, :width], self.rest), at_positions(self.model, first, first):
            cache = self.model(**inputs, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers[self.layer + 1 :]]

    def take(self, chosen: Tensor) -> Tails:
        """Some of the rows."""
        part = object.__new__(Tails)
        part.model, part.layout, part.layer, part.rest = self.model, self.layout, self.layer, self.rest
        part.before, mask = self.before[chosen], self.mask[chosen]
        width, length = int(part.before.max()), int(mask.sum(1).max())
        part.mask, part.input_ids, part.hidden = mask[:, :length], self.input_ids[chosen, :length], self.hidden[chosen, :length]
        part.start = part.hidden[:, 0]
        part.memory = [(keys[chosen, :, :width], values[chosen, :, :width]) for keys, values in self.memory] if width else []
        return part

    def logits(self, change: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Run what follows a change.

        Args:
            change: ``(B, v)``, added in its own precision.
            rows: ``(N,)`` rows whose logits are wanted.
            tokens: ``(N,)`` the token in each, counted from the changed one.

        Returns:
            ``(N, V)``, with gradients to the change.
        """
        first = (self.start.float() + change).to(self.hidden.dtype)
        injected = torch.cat([first[:, None], self.hidden[:, 1:]], 1)
        mask = self.mask
        place = self.before[:, None] + torch.arange(mask.shape[1], device=mask.device)
        # Padding stays within the model's reach.
        place = place.clamp_max(int((self.before + mask.sum(1)).max()) - 1)
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": place, "use_cache": False}
        if self.memory:
            width = self.memory[0][0].shape[2]
            mask = torch.cat([torch.arange(width, device=mask.device) < self.before[:, None], mask], 1)
            inputs |= {"past_key_values": self._cache(), "use_cache": True}
        inputs["attention_mask"] = mask.long()
        with replaying(self.model, self.layout, self.layer, injected, self.rest), at_positions(self.model, rows, tokens):
            logits: Tensor = self.model(**inputs).logits[0]
        return logits

    def _cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        keys = self.memory[0][0]
        # Blocks that are skipped hold nothing, but masks are made after the length of the first.
        nothing = keys.new_zeros(len(keys), 1, keys.shape[2], 1)
        for layer in range(self.layer + 1):
            cache.update(nothing, nothing, layer)
        for layer, (own, values) in enumerate(self.memory, self.layer + 1):
            cache.update(own, values, layer)
        return cache
