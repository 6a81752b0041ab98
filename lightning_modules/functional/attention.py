"""Attention masks for rows that hold more than one sequence.

Shapes: B rows, T key positions, Q query positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def model_mask(model: nn.Module, allowed: Tensor) -> Tensor:
    """Turn "may attend" into the mask that a Hugging Face decoder takes.

    Args:
        model: The decoder; its ``config`` names the attention implementation.
        allowed: ``(B, Q, T)`` bool, True where a query may see a key.

    Returns:
        ``(B, 1, Q, T)``: boolean for SDPA, additive for eager attention.

    Raises:
        ValueError: If the implementation takes no mask of one's own.
    """
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
