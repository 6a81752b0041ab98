"""Decoding many continuations of a prompt in one row: they share the prompt's cache, and no beam is ever copied or reordered.

Shapes: R rows, P prompt tokens, n tokens of a step, X tokens fed after the prompt so far, V vocabulary, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.attention import Reach, document_mask, model_mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout; afterwards each submodule is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class SharedCache:
    """Keys and values of prompt and tree, in growing buffers.

    It offers what Hugging Face's attention layers ask of a cache when masks and positions are given. All keys stay, also those beyond a sliding
    window: masks hide them. Its buffers grow by doubling, where a ``DynamicCache`` copies all keys and values at every step.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self.prompt_length = 0

    @property
    def is_sliding(self) -> list[bool]:
        """Return whether each layer drops keys beyond its window."""
        return [False] * len(self.keys)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append ``(R, H, n, D)`` keys and values to a layer and return all of them."""
        if layer_idx == len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
            self.lengths.append(key_states.shape[-2])
            self.prompt_length = self.lengths[0]
            return key_states, value_states
        start = self.lengths[layer_idx]
        end = start + key_states.shape[-2]
        if end > self.keys[layer_idx].shape[-2]:
            room = self.prompt_length + 2 * (end - self.prompt_length)
            self.keys[layer_idx] = _with_room(self.keys[layer_idx][..., :start, :], room)
            self.values[layer_idx] = _with_room(self.values[layer_idx][..., :start, :], room)
        self.keys[layer_idx][..., start:end, :] = key_states
        self.values[layer_idx][..., start:end, :] = value_states
        self.lengths[layer_idx] = end
        return self.keys[layer_idx][..., :end, :], self.values[layer_idx][..., :end, :]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens a layer holds."""
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and the offset of the keys that ``query_length`` further tokens will see."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self.keys = [keys[..., :length, :][rows] for keys, length in zip(self.keys, self.lengths, strict=True)]
        self.values = [values[..., :length, :][rows] for values, length in zip(self.values, self.lengths, strict=True)]


def _with_room(states: Tensor, length: int) -> Tensor:
    """Copy ``(R, H, X, D)`` into a buffer of ``length`` columns."""
    buffer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer


class TreeDecoder:
    """Feeds the tokens of a tree of continuations, a level at a time.

    The tokens of a step are further columns of the prompt's row. A mask lets each see the prompt and its own ancestors, and
    positions restart after the prompt, so that every token computes what it would at the end of its own sequence.

    Args:
        model: Hugging Face causal language model with a key-value cache, under an attention implementation that takes
            4-D masks (``eager`` or ``sdpa``), which uses the ``position_ids`` it is given.
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool, True on real tokens.
        plan: Reach of the model's layers; see :func:`~malleable.lightning_modules.functional.language.attention.model_mask`.

    Attributes:
        logits: ``(R, 1, V)``, at the prompt's last token.

    Source:
        Miao et al. (2024), SpecInfer, arXiv:2305.09781, tree attention.
        Differs: the tree is searched, not verified; finished rows leave.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, plan: tuple[Reach, ...] = ()) -> None:
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
            parent: ``(R, n)`` int64, which token of the previous call (of the prompt: 0) each one descends from.
            depth: Number of tokens between the prompt's end and each token; an int or ``(R, n)`` int64.
            within: ``(R, n, n)`` bool, which tokens of this call each token sees; default: itself.

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
        """Keep some rows only."""
        self.cache.select(rows)
        self.prompt_mask, self.lengths, self.visible = self.prompt_mask[rows], self.lengths[rows], self.visible[rows]
        self.positions = self.positions[rows]

    def idle(self) -> None:
        """Run the model without effect, to keep step with ranks that still have work."""
        self.model(input_ids=self.lengths.new_zeros(1, 1), use_cache=False)
