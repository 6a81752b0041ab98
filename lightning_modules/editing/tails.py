"""Rows whose end alone depends on a change at one token: all else is computed once.

Shapes: B rows, P tokens before the changed ones, S tokens from them on, v width of the residual stream, V vocabulary, N logits asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.passes import at_positions, replaying, stopping
from malleable.lightning_modules.editing.prompts import Rows


class Tails:
    """What follows in a decoder from a change of the residual stream behind a block, at one token of each row.

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
        with torch.no_grad(), stopping(model, layout, layer, []) as seen:
            seen.run(**rows.inputs())
        assert seen.output is not None
        self.rest = seen.rest
        hidden = seen.output
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
