"""Attention masks for rows that hold more than one sequence.

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
"""Attention implementations that take a ``(B, 1, Q, T)`` mask."""


CAUSAL_ATTENTION = "malleable_causal_sdpa"
"""Name under which transformers knows SDPA without a mask; see :func:`causal_attention`."""


@contextmanager
def causal_attention(config: Any) -> Iterator[None]:
    """Let SDPA layers run causal kernels without a mask; other implementations stay as they are.

    Transformers builds a mask also where none is given: compiled always, and otherwise after a look at the positions, for which the host waits. It
    builds none for an attention implementation that it has no mask function for. SDPA under another name is one; without a mask it takes
    ``is_causal=True``, which is FlashAttention on CUDA.

    Args:
        config: The model's configuration.
    """
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    # Of a loaded model its library is loaded, too.
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    functions.register(CAUSAL_ATTENTION, functions["sdpa"])
    config._attn_implementation = CAUSAL_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


class Reach(NamedTuple):
    """How far the layers of one type can attend.

    Attributes:
        layer_type: Key of their mask in the dictionary that the model takes; ``None`` where all layers share one mask.
        kind: ``full``; ``window``: the last ``size`` positions; ``chunk``: the positions of the same block of ``size``.
        size: Number of positions; 0 for ``full``.
    """

    layer_type: str | None
    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def sees(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """Return which keys lie within reach, ``(B, Q, T)`` bool; ``None`` means all.

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


def mask_plans(config: Any) -> list[tuple[Reach, ...]]:
    """List the ways in which a model of this configuration may take block masks, the most specific first.

    Which one is exact must be measured (:mod:`malleable.lightning_modules.functional.language.pass_forms`).
    The empty plan is the mask of "may attend" as it is.
    """
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)

    def reach(layer_type: str | None) -> Reach:
        name = str(layer_type)
        if window and ("sliding" in name or "local" in name):
            return Reach(layer_type, "window", window)
        if chunk and "chunk" in name:
            return Reach(layer_type, "chunk", chunk)
        return Reach(layer_type)

    plans: list[tuple[Reach, ...]] = [tuple(reach(name) for name in types)] if types else []
    if window:
        plans.append((Reach(None, "window", window),))
    # Without a window the plain mask needs no dictionary.
    return [*plans, ()] if any(part.size for plan in plans for part in plan) else [(), *plans]


def avoid_planned_kernels() -> None:
    """Switch off cuDNN's attention kernels for this process.

    They are planned again for each shape, which takes longer than the attention itself where widths change from batch to batch, as they do in
    text: steps in half precision become 10 to 20 times slower. FlashAttention (rows without a mask of their own) and the memory-efficient
    kernels (any mask) need no plan. ``torch.backends.cuda.enable_cudnn_sdp(True)``, called later, switches them on again.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def model_mask(
    model: nn.Module,
    allowed: Tensor,
    plan: tuple[Reach, ...] = (),
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Turn "may attend" into the mask that a Hugging Face decoder takes.

    Args:
        model: The decoder; its ``config`` names the attention implementation.
        allowed: ``(B, Q, T)`` bool, True where a query may see a key in a layer without a window.
        plan: Reach of the layers; empty where every layer reaches all positions.
        query_positions: ``(B, Q)`` int64, counted within each sequence; needed with a plan.
        key_positions: ``(B, T)`` int64; default: ``query_positions``.

    Returns:
        ``(B, 1, Q, T)``: boolean for SDPA, additive for eager attention; a dictionary by layer type where the plan has several.

    Raises:
        ValueError: If the implementation takes no mask of one's own.
    """
    masks: dict[str | None, Tensor] = {}
    for reach in plan:
        assert query_positions is not None
        sees = reach.sees(query_positions, query_positions if key_positions is None else key_positions)
        masks[reach.layer_type] = _format(model, allowed if sees is None else allowed & sees)
    if not masks:
        return _format(model, allowed)
    return masks[None] if None in masks else {str(name): mask for name, mask in masks.items()}


def _format(model: nn.Module, allowed: Tensor) -> Tensor:
    """Return the ``(B, 1, Q, T)`` mask that the attention implementation takes."""
    implementation = getattr(model.config, "_attn_implementation", "sdpa")
    mask = allowed[:, None]
    if implementation == "sdpa":
        return mask
    if implementation == "eager":
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    raise ValueError(f"attention '{implementation}' takes no block mask; load the model with attn_implementation='sdpa'")


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents.

    Args:
        document_ids: ``(B, T)``; equal numbers belong together, 0 is padding.

    Returns:
        ``(B, T, T)`` bool; padding sees itself alone, so that no row of the softmax is empty.
    """
    width = document_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    diagonal = torch.eye(width, dtype=torch.bool, device=document_ids.device)
    return (same & causal & (document_ids > 0)[:, None, :]) | diagonal
