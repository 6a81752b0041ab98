"""Logits after a change of the residual stream at one token of each row, from full forward passes or from passes over the ends of rows only.

The end of a row consists of its changed token and the tokens after it.

Shapes: B rows, T tokens, P tokens before the changed one, S tokens from the changed one on, v width of the residual stream, V vocabulary,
N requested logits.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from malleable.lightning_modules.editing.layout import Layout
from malleable.lightning_modules.editing.partial_forward import capture_until, logits_at, replace_block_output, resume_from
from malleable.lightning_modules.editing.prompts import RowBatch

log = logging.getLogger(__name__)

TOLERANCE = 1e-4


def choose_forward(model: Any, layout: Layout, layer: int, rows: RowBatch) -> SuffixForward | FullForward:
    """Return the fastest exact forward pass for changes of a block's output.

    This is :class:`SuffixForward` if it gives the same logits as :class:`FullForward`. The logits differ if the attention window is shorter than the
    row, if the model ignores ``position_ids``, or if it has recurrent layers.

    Args:
        model: Decoder in evaluation mode.
        layout: Names of its modules.
        layer: Block whose output is changed.
        rows: Rows; ``position`` is the changed token.
    """
    try:
        forward = SuffixForward(model, layout, layer, rows)
        if _is_exact(forward, model, layout, layer, rows):
            return forward
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.debug("passes over the ends of rows failed: %s", error)
    log.info("%s: full forward passes are used, because passes over the ends of rows do not give the same logits", type(model).__name__)
    return FullForward(model, layout, layer, rows)


@torch.no_grad()
def _is_exact(forward: SuffixForward, model: Any, layout: Layout, layer: int, rows: RowBatch) -> bool:
    """Return whether passes over the ends of rows give the logits of full passes after a change.

    Three rows are compared: the longest row, the row with the longest end, and the row with the fewest tokens before the changed one. The first two
    extend farthest beyond an attention window. The last one has the most padding in the cache of keys and values.
    """
    lengths, before = rows.attention_mask.sum(1), rows.position
    shortest = torch.where(before > 0, before, before.max() + 1).argmin()
    chosen = torch.stack([lengths.argmax(), (lengths - before).argmax(), shortest])
    full = FullForward(model, layout, layer, rows.select(chosen))
    change = torch.zeros_like(forward.start, dtype=torch.float)
    change[chosen] = full.start.float().roll(1, -1)
    last = (lengths - before)[chosen] - 1
    found = forward.logits(change, chosen, last).float()
    expected = full.logits(change[chosen], torch.arange(len(chosen), device=chosen.device), last).float()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return bool(error.max() <= max(TOLERANCE, 8 * torch.finfo(full.start.dtype).eps))


@torch.no_grad()
def _run_until(model: Any, layout: Layout, layer: int, rows: RowBatch) -> tuple[Tensor, tuple[Any, ...] | None]:
    """Run rows up to a block; return its output ``(B, T, v)`` and its other outputs."""
    with capture_until(model, layout, layer, []) as captured:
        captured.run(**rows.inputs())
    assert captured.output is not None
    return captured.output, captured.extra_outputs


class FullForward:
    """Full forward passes with a change of a block's output at one token of each row.

    Rows are padded on the right, which is exact for every causal decoder.

    Args:
        model: Decoder in evaluation mode.
        layout: Names of its modules.
        layer: Block whose output is changed.
        rows: Rows; ``position`` is the changed token.

    Attributes:
        start: ``(B, v)`` residual stream at the changed tokens, before the change.
    """

    def __init__(self, model: Any, layout: Layout, layer: int, rows: RowBatch) -> None:
        self.model, self.layout, self.layer, self.rows = model, layout, layer, rows
        hidden, _ = _run_until(model, layout, layer, rows)
        self.start = hidden[self._row_indices(), rows.position]

    def _row_indices(self) -> Tensor:
        return torch.arange(len(self.rows.position), device=self.rows.position.device)

    def select(self, chosen: Tensor) -> FullForward:
        """Return the passes of the rows at the positions ``chosen`` only."""
        part = object.__new__(FullForward)
        part.model, part.layout, part.layer = self.model, self.layout, self.layer
        part.rows, part.start = self.rows.select(chosen), self.start[chosen]
        return part

    def logits(self, change: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return logits after a change; arguments and result as in :meth:`SuffixForward.logits`."""
        changed = self.start.float() + change

        def replace(hidden: Tensor) -> Tensor:
            return hidden.index_put((self._row_indices(), self.rows.position), changed.to(hidden.dtype))

        positions = self.rows.position[rows] + tokens
        with replace_block_output(self.model, self.layout, self.layer, replace), logits_at(self.model, rows, positions):
            logits: Tensor = self.model(**self.rows.inputs(), use_cache=False).logits[0]
        return logits


class SuffixForward:
    """Forward passes over the ends of rows only, with cached keys and values of the tokens before the changed one.

    Blocks up to ``layer`` run once, over all tokens. Later blocks run once over the tokens before the changed one, whose keys and values are cached,
    and in every pass over the changed token and the tokens after it.

    Args:
        model: Decoder in evaluation mode, whose only state is a cache of keys and values.
        layout: Names of its modules.
        layer: Block whose output is changed.
        rows: Rows; ``position`` is the changed token.

    Attributes:
        start: ``(B, v)`` residual stream at the changed tokens, before the change.
    """

    def __init__(self, model: Any, layout: Layout, layer: int, rows: RowBatch) -> None:
        self.model, self.layout, self.layer = model, layout, layer
        self.prefix_lengths = rows.position
        hidden, self.extra_outputs = _run_until(model, layout, layer, rows)
        lengths = rows.attention_mask.sum(1) - self.prefix_lengths
        column = torch.arange(int(lengths.max()), device=hidden.device)
        self.mask = column < lengths[:, None]
        position = (self.prefix_lengths[:, None] + column).clamp_max(hidden.shape[1] - 1)
        self.input_ids = rows.input_ids.gather(1, position)
        self.hidden = hidden.gather(1, position[..., None].expand(-1, -1, hidden.shape[2]))
        self.start = self.hidden[:, 0]
        self.prefix_cache = self._cache_prefixes(rows, hidden)

    def _cache_prefixes(self, rows: RowBatch, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return a pair of keys and values, ``(B, heads, P, head width)`` each, of each later block, for the tokens before the changed ones."""
        width = int(self.prefix_lengths.max())
        if width == 0:
            return []
        inputs = {"input_ids": rows.input_ids[:, :width], "attention_mask": rows.attention_mask[:, :width]}
        first = torch.zeros(1, dtype=torch.long, device=hidden.device)
        resumed = resume_from(self.model, self.layout, self.layer, hidden[:, :width], self.extra_outputs)
        with torch.no_grad(), resumed, logits_at(self.model, first, first):
            cache = self.model(**inputs, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers[self.layer + 1 :]]

    def select(self, chosen: Tensor) -> SuffixForward:
        """Return the passes of the rows at the positions ``chosen`` only."""
        part = object.__new__(SuffixForward)
        part.model, part.layout, part.layer, part.extra_outputs = self.model, self.layout, self.layer, self.extra_outputs
        part.prefix_lengths, mask = self.prefix_lengths[chosen], self.mask[chosen]
        width, length = int(part.prefix_lengths.max()), int(mask.sum(1).max())
        part.mask, part.input_ids, part.hidden = mask[:, :length], self.input_ids[chosen, :length], self.hidden[chosen, :length]
        part.start = part.hidden[:, 0]
        part.prefix_cache = [(keys[chosen, :, :width], values[chosen, :, :width]) for keys, values in self.prefix_cache] if width else []
        return part

    def logits(self, change: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return logits after a change.

        Args:
            change: ``(B, v)``, added in its own precision.
            rows: ``(N,)`` row of each requested token.
            tokens: ``(N,)`` position of each requested token, relative to the changed token.

        Returns:
            ``(N, V)``, differentiable with respect to the change.
        """
        first = (self.start.float() + change).to(self.hidden.dtype)
        changed = torch.cat([first[:, None], self.hidden[:, 1:]], 1)
        mask = self.mask
        position = self.prefix_lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
        # Positions of padding must not exceed the maximum length of the model.
        position = position.clamp_max(int((self.prefix_lengths + mask.sum(1)).max()) - 1)
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": position, "use_cache": False}
        if self.prefix_cache:
            width = self.prefix_cache[0][0].shape[2]
            mask = torch.cat([torch.arange(width, device=mask.device) < self.prefix_lengths[:, None], mask], 1)
            inputs |= {"past_key_values": self._make_cache(), "use_cache": True}
        inputs["attention_mask"] = mask.long()
        with resume_from(self.model, self.layout, self.layer, changed, self.extra_outputs), logits_at(self.model, rows, tokens):
            logits: Tensor = self.model(**inputs).logits[0]
        return logits

    def _make_cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        keys = self.prefix_cache[0][0]
        # Skipped blocks have no keys, but attention masks are built from the length of the first block's cache.
        placeholder = keys.new_zeros(len(keys), 1, keys.shape[2], 1)
        for layer in range(self.layer + 1):
            cache.update(placeholder, placeholder, layer)
        for layer, (own, values) in enumerate(self.prefix_cache, self.layer + 1):
            cache.update(own, values, layer)
        return cache
