"""Cross-entropy over all items in chunks of positions, without storing the scores of all positions.

Shapes: P positions, N items, d width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malleable.lightning_modules.functional.precision import DEVICES, full

# Scores of a chunk: 8 MB on a CPU, 256 MB on an accelerator (neither was compared with other sizes).
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}


def item_cross_entropy(states: Tensor, items: Tensor, target: Tensor, weight: Tensor, chunk: int | None = None) -> Tensor:
    """Compute ``sum_p weight_p (log sum_j exp s_pj - s_p,target)`` with ``s = states @ items.T``.

    Gradients are computed in the forward pass, chunk by chunk, so that no scores are stored and each score is computed once.

    Args:
        states: ``(P, d)``.
        items: ``(N, d)`` embeddings of the items.
        target: ``(P,)`` int64; any item where the weight is 0.
        weight: ``(P,)`` float32.
        chunk: Number of positions scored at once. Default: chosen for the device.

    Returns:
        Scalar float32. It supports one backward pass.
    """
    if chunk is None:
        chunk = max(1, CHUNK.get(states.device.type, CHUNK["cuda"]) // len(items))
    device = states.device.type
    autocast = device in DEVICES and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.float32
    return cast("Tensor", _ItemCrossEntropy.apply(states, items, target, weight, chunk, dtype, torch.is_grad_enabled()))  # type: ignore[no-untyped-call]


class _ItemCrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass scales the gradients."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, target: Tensor, weight: Tensor, chunk: int, dtype: torch.dtype, gradient: bool) -> Tensor:
        """Return the loss.

        Args:
            ctx: Context of autograd.
            states: ``(P, d)``.
            items: ``(N, d)``.
            target: ``(P,)``.
            weight: ``(P,)``.
            chunk: Number of positions scored at once.
            dtype: Precision of the matrix products; sums and exponentials are computed in float32.
            gradient: Whether gradients are needed.
        """
        wants_states, wants_items = (gradient and needed for needed in ctx.needs_input_grad[:2])
        left, right = states.to(dtype), items.to(dtype)
        grad_states = torch.empty_like(states) if wants_states else None
        grad_items = torch.zeros_like(items, dtype=torch.float32) if wants_items else None
        total = weight.new_zeros(())
        for rows in (slice(start, start + chunk) for start in range(0, len(states), chunk)):
            scores = full(left[rows] @ right.T)
            own, share = target[rows, None], weight[rows, None]
            log_sum = scores.logsumexp(1, keepdim=True)
            total += ((log_sum - scores.gather(1, own)) * share).sum()
            if not (wants_states or wants_items):
                continue
            # Weights multiply the results, because their products with small probabilities would underflow in half precision.
            residual = scores.sub_(log_sum).exp_().scatter_add_(1, own, -torch.ones_like(share)).to(dtype)
            if grad_states is not None:
                grad_states[rows] = residual @ right * share
            if grad_items is not None and dtype == torch.float32:
                grad_items.addmm_(residual.T, left[rows] * share)
            elif grad_items is not None:
                scale = share.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
                grad_items += full(residual.T @ (left[rows] * (share / scale)).to(dtype)) * scale
        ctx.save_for_backward(grad_states, None if grad_items is None else grad_items.to(items.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states and items."""
        grads = [None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)
