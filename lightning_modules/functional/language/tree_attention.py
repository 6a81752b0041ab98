"""Decoding of several continuations of a prompt in one row, which share the cache of the prompt and need no reordering of beams.

Shapes: R rows, P prompt tokens, n tokens of a step, X tokens fed after the prompt so far, V vocabulary, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.attention import AttentionSpan, document_mask, model_mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in evaluation mode; restore the mode of each submodule afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class SharedCache:
    """Cache of the keys and values of prompt and tree.

    It implements the part of the cache interface of Hugging Face that attention layers use when masks and positions are given. It keeps keys outside
    a sliding window, which masks exclude. Buffers grow by doubling; a ``DynamicCache`` copies all keys and values in every step.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self.prompt_length = 0

    @property
    def is_sliding(self) -> list[bool]:
        """Return whether each layer drops keys outside its window: False for all."""
        return [False] * len(self.keys)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``(R, H, n, D)`` to a layer; return all of its keys and values."""
        if layer_idx == len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
            self.lengths.append(key_states.shape[-2])
            self.prompt_length = self.lengths[0]
            return key_states, value_states
        start = self.lengths[layer_idx]
        end = start + key_states.shape[-2]
        if end > self.keys[layer_idx].shape[-2]:
            capacity = self.prompt_length + 2 * (end - self.prompt_length)
            self.keys[layer_idx] = _copy_to_buffer(self.keys[layer_idx][..., :start, :], capacity)
            self.values[layer_idx] = _copy_to_buffer(self.values[layer_idx][..., :start, :], capacity)
        self.keys[layer_idx][..., start:end, :] = key_states
        self.values[layer_idx][..., start:end, :] = value_states
        self.lengths[layer_idx] = end
        return self.keys[layer_idx][..., :end, :], self.values[layer_idx][..., :end, :]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens in the cache of a layer."""
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and the offset of the keys that the next ``query_length`` tokens attend to."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        self.keys = [keys[..., :length, :][rows] for keys, length in zip(self.keys, self.lengths, strict=True)]
        self.values = [values[..., :length, :][rows] for values, length in zip(self.values, self.lengths, strict=True)]


def _copy_to_buffer(states: Tensor, length: int) -> Tensor:
    """Copy states ``(R, H, X, D)`` to a new buffer with ``length`` columns."""
    buffer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer


class TreeDecoder:
    """Decoder of a tree of continuations, one level at a time.

    The tokens of a step are appended as columns to the row of the prompt. Each token attends to the prompt and to its ancestors, and its position is
    its depth after the prompt. The result therefore equals that of a separate sequence for each token.

    Args:
        model: Hugging Face causal language model with a key-value cache, an attention implementation that accepts 4-D masks (``eager`` or ``sdpa``),
            and support for ``position_ids``.
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool, True on real tokens.
        plan: Attention spans of the model's layers; see :func:`~malleable.lightning_modules.functional.language.attention.model_mask`.

    Attributes:
        logits: ``(R, 1, V)``, at the last token of the prompt.

    Source:
        Miao et al. (2024), SpecInfer, arXiv:2305.09781, tree attention.
        Differs: the tree is searched instead of verified; finished rows are removed.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, plan: tuple[AttentionSpan, ...] = ()) -> None:
        self.model, self.plan = model, plan
        self.prompt_mask = prompt_mask.bool()
        self.lengths = self.prompt_mask.sum(1, keepdim=True)
        self.positions = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
        self.cache = SharedCache()
        output = model(
            input_ids=prompt_ids,
            attention_mask=model_mask(model, document_mask(self.prompt_mask.long()), plan, self.positions),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits: Tensor = output.logits[:, -1:]
        self.visible = self.prompt_mask.new_zeros(len(prompt_ids), 1, 0)

    def extend(self, tokens: Tensor, parent: Tensor, depth: Tensor | int, within: Tensor | None = None) -> Tensor:
        """Feed the next tokens.

        Args:
            tokens: ``(R, n)`` int64.
            parent: ``(R, n)`` int64, index in the previous call of the parent of each token; 0 in the first call.
            depth: Number of tokens between the end of the prompt and each token; an int or ``(R, n)`` int64.
            within: ``(R, n, n)`` bool, which tokens of this call each token attends to; default: itself.

        Returns:
            Logits ``(R, n, V)``.
        """
        rows, count = tokens.shape
        if within is None:
            within = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        inherited = self.visible.gather(1, parent[..., None].expand(-1, -1, self.visible.shape[2]))
        self.visible = torch.cat([inherited, within], -1)
        visible = torch.cat([self.prompt_mask[:, None].expand(-1, count, -1), self.visible], -1)
        position_ids = (self.lengths + depth).expand(-1, count)
        self.positions = torch.cat([self.positions, position_ids], 1)
        output = self.model(
            input_ids=tokens,
            attention_mask=model_mask(self.model, visible, self.plan, position_ids, self.positions),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        self.cache.select(rows)
        self.prompt_mask, self.lengths, self.visible = self.prompt_mask[rows], self.lengths[rows], self.visible[rows]
        self.positions = self.positions[rows]

    def idle(self) -> None:
        """Run the model and discard the result, because sharded weights require all ranks to run it equally often."""
        self.model(input_ids=self.lengths.new_zeros(1, 1), use_cache=False)
