"""Attention masks for rows that contain several sequences.

Shapes: B rows, T key positions, Q query positions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept a ``(B, 1, Q, T)`` mask."""

CAUSAL_ATTENTION = "malleable_causal_sdpa"
"""Name under which SDPA without a mask is registered in transformers; see :func:`causal_attention`."""


@contextmanager
def causal_attention(config: Any) -> Iterator[None]:
    """Run SDPA layers with causal kernels and without a mask; other attention implementations are not changed.

    Transformers builds a mask even if none is given: always under compilation, otherwise after a check of the positions, which synchronises with
    the device. It builds no mask for an attention implementation without a registered mask function. Therefore SDPA is registered under another
    name. Without a mask it runs with ``is_causal=True``, which is FlashAttention on CUDA.

    Args:
        config: The model's configuration.
    """
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    # transformers is imported already if a model is loaded; an import here would slow down other users of this module.
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    functions.register(CAUSAL_ATTENTION, functions["sdpa"])
    config._attn_implementation = CAUSAL_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


class AttentionSpan(NamedTuple):
    """Positions that the layers of one type attend to.

    Attributes:
        layer_type: Key of the mask in the dictionary that the model accepts; ``None`` if all layers use one mask.
        kind: ``full``; ``window``: the last ``size`` positions; ``chunk``: the positions in the same block of ``size``.
        size: Number of positions; 0 for ``full``.
    """

    layer_type: str | None
    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def mask(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """Return which keys a query attends to, ``(B, Q, T)`` bool; ``None`` means all.

        Args:
            query_positions: ``(B, Q)`` int64, counted within each sequence.
            key_positions: ``(B, T)`` int64.
        """
        query, key = query_positions[:, :, None], key_positions[:, None]
        if self.kind == "window":
            return key > query - self.size
        if self.kind == "chunk":
            return key // self.size == query // self.size
        return None


def mask_plans(config: Any) -> list[tuple[AttentionSpan, ...]]:
    """Return the candidate mask plans of a model: the attention spans of its layer types.

    Which plan is exact must be measured, see :mod:`malleable.lightning_modules.functional.language.pass_forms`. The empty plan uses one mask for all
    layers. Plans are ordered: without windows, the empty plan comes first, otherwise the most specific one.
    """
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)

    def span(layer_type: str | None) -> AttentionSpan:
        name = str(layer_type)
        if window and ("sliding" in name or "local" in name):
            return AttentionSpan(layer_type, "window", window)
        if chunk and "chunk" in name:
            return AttentionSpan(layer_type, "chunk", chunk)
        return AttentionSpan(layer_type)

    plans: list[tuple[AttentionSpan, ...]] = [tuple(span(name) for name in types)] if types else []
    if window:
        plans.append((AttentionSpan(None, "window", window),))
    # Without a window, one mask for all layers suffices.
    return [*plans, ()] if any(part.size for plan in plans for part in plan) else [(), *plans]


def avoid_planned_kernels() -> None:
    """Disable the attention kernels of cuDNN in this process.

    They need a plan for each shape. Planning takes longer than the attention itself if the widths of batches vary, as they do for text: steps in
    half precision become 10 to 20 times slower. FlashAttention (without a mask) and the memory-efficient kernels (any mask) need no plan. Call
    ``torch.backends.cuda.enable_cudnn_sdp(True)`` to enable the cuDNN kernels again.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def model_mask(
    model: nn.Module,
    allowed: Tensor,
    plan: tuple[AttentionSpan, ...] = (),
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Convert a boolean mask to the attention mask of a Hugging Face decoder.

    Args:
        model: The decoder; its ``config`` names the attention implementation.
        allowed: ``(B, Q, T)`` bool, True where a query attends to a key in layers without a window.
        plan: Attention spans of the layer types; empty if all layers attend to all positions.
        query_positions: ``(B, Q)`` int64, positions within each sequence; required with a plan.
        key_positions: ``(B, T)`` int64; default: ``query_positions``.

    Returns:
        ``(B, 1, Q, T)``, boolean for SDPA, additive for eager attention; a dictionary by layer type if the plan has several.

    Raises:
        ValueError: If the attention implementation does not accept a mask.
    """
    masks: dict[str | None, Tensor] = {}
    for span in plan:
        assert query_positions is not None
        within = span.mask(query_positions, query_positions if key_positions is None else key_positions)
        masks[span.layer_type] = _format(model, allowed if within is None else allowed & within)
    if not masks:
        return _format(model, allowed)
    return masks[None] if None in masks else {str(name): mask for name, mask in masks.items()}


def _format(model: nn.Module, allowed: Tensor) -> Tensor:
    """Convert ``(B, Q, T)`` bool to the ``(B, 1, Q, T)`` mask of the attention implementation."""
    implementation = getattr(model.config, "_attn_implementation", "sdpa")
    mask = allowed[:, None]
    if implementation == "sdpa":
        return mask
    if implementation == "eager":
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attention '{implementation}' does not accept a custom mask; load the model with attn_implementation='sdpa'")


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the mask of causal attention within documents.

    Args:
        document_ids: ``(B, T)``; tokens with equal numbers belong to one document, 0 is padding.

    Returns:
        ``(B, T, T)`` bool; padding attends to itself only, so that no row of the softmax is empty.
    """
    width = document_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    diagonal = torch.eye(width, dtype=torch.bool, device=document_ids.device)
    return (same & causal & (document_ids > 0)[:, None, :]) | diagonal
