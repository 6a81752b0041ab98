"""Decoding many continuations of a prompt in one row: the prompt's cache is shared, nothing is copied or reordered.

Shapes: R rows, P prompt tokens, n tokens of a step, X tokens fed after the prompt so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


class TreeDecoder:
    """Feeds the tokens of a tree of continuations, a level at a time.

    The tokens of a step are further columns of the prompt's row. A mask lets each see the prompt and its own ancestors, and
    positions restart after the prompt, so that every token computes what it would at the end of its own sequence.

    Args:
        model: Hugging Face causal language model with a key-value cache, under a full-attention implementation that takes
            4-D masks (``eager`` or ``sdpa``).
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool, True on real tokens.
        max_new_tokens: Longest continuation, to check it against a sliding window.

    Attributes:
        logits: ``(R, 1, V)``, at the prompt's last token.

    Raises:
        ValueError: If the prompt and the continuation exceed the model's sliding window.

    Source:
        Miao et al. (2024), SpecInfer, arXiv:2305.09781, section 4.2 (tree attention).
        Differs: the tree is searched, not verified.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int = 0) -> None:
        self.model = model
        self.prompt_mask = prompt_mask.bool()
        self.lengths = self.prompt_mask.sum(1, keepdim=True)
        positions = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=prompt_ids, attention_mask=self.prompt_mask.long(), position_ids=positions, use_cache=True, logits_to_keep=1
        )
        self.logits: Tensor = output.logits[:, -1:]
        self.cache = _without_window(output.past_key_values, prompt_ids.shape[1] + max_new_tokens)
        self.visible = self.prompt_mask.new_zeros(len(prompt_ids), 1, 0)

    def extend(self, tokens: Tensor, parent: Tensor, depth: Tensor | int, within: Tensor | None = None) -> Tensor:
        """Feed the next tokens.

        Args:
            tokens: ``(R, n)`` int64.
            parent: ``(R, n)`` int64, which token of the previous call (of the prompt: 0) each one follows.
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
        mask = torch.cat([self.prompt_mask[:, None].expand(-1, count, -1), self.visible], -1)
        output = self.model(
            input_ids=tokens,
            attention_mask=self._additive(mask[:, None]),
            position_ids=(self.lengths + depth).expand(-1, count),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self.cache.batch_select_indices(rows)
        self.prompt_mask, self.lengths, self.visible = self.prompt_mask[rows], self.lengths[rows], self.visible[rows]

    def idle(self) -> None:
        """Run the model without effect, to keep step with ranks that still have work."""
        self.model(input_ids=self.lengths.new_zeros(1, 1), use_cache=False)

    def _additive(self, mask: Tensor) -> Tensor:
        # eager attention adds its mask; a finite minimum keeps rows without any visible token free of NaN
        dtype = self.cache.layers[0].keys.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _without_window(cache: Any, length: int) -> Any:
    """Make the layers of a sliding-window cache plain ones: sibling tokens would push the prompt out of the window."""
    windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
    if not windows:
        return cache
    if length >= min(windows):
        raise ValueError(
            f"prompt and continuation of {length} tokens exceed the model's sliding window of {min(windows)}; shorten the prompt"
        )
    plain = type(cache)()
    for index, layer in enumerate(cache.layers):
        plain.update(layer.keys, layer.values, index)
    return plain
