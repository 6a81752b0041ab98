"""Log-probabilities of selected tokens without a float32 copy of the logits.

Shapes: B rows, T positions, N selected tokens of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Number of logits converted to float32 at once: 2 MiB fit the cache of a CPU; 128 MiB on an accelerator make launch overhead negligible.
CHUNK = 1 << 19
ACCELERATOR_CHUNK = 1 << 25


def selected_token_logps(logits: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Compute the log-probabilities of selected tokens in float32 from logits of any floating-point dtype.

    Equals ``logits.log_softmax(-1, dtype=torch.float32)`` indexed at ``positions`` and ``targets``, but converts only a part of the logits to float32
    at once. Between forward and backward pass, the logits and one float32 number for each position are stored. The backward pass allocates the
    gradient in the dtype of the logits. For bfloat16, peak memory is 4 bytes for each logit, against 14 bytes for ``log_softmax``, which needs the
    logits and about three float32 copies.

    Second derivatives are supported (``create_graph=True``), with the memory of ``log_softmax``.

    Args:
        logits: ``(B, T, V)``; float64 is not converted.
        targets: ``(B, N)`` int64, the selected tokens.
        positions: ``(B, N)`` int64, position of the logits of each selected token; default: one token for each position, N = T.

    Returns:
        ``(B, N)`` float32 (float64 for float64 logits), in nats.
    """
    rows, width, vocab = logits.shape
    if positions is None:
        positions = torch.arange(width, device=logits.device).expand(rows, -1)
    first = torch.arange(rows, device=logits.device)[:, None] * width
    place = first + positions
    logps: Tensor = _SelectedLogps.apply(logits.reshape(rows * width, vocab), targets.flatten(), place.flatten())  # type: ignore[no-untyped-call]
    return logps.reshape(targets.shape)


class _SelectedLogps(torch.autograd.Function):
    """Log-probabilities ``(B * N,)`` of logits ``(B * T, V)`` at rows ``place`` and columns ``targets``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, place: Tensor) -> Tensor:
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        total = torch.cat([part.to(kind).logsumexp(-1) for part in torch.split(logits, _part(logits))])
        ctx.save_for_backward(logits, total, targets, place)
        return logits[place, targets].to(kind) - total[place]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, total, targets, place = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives (create_graph=True) need operations that autograd records.
            return _recorded_gradient(logits, targets, place, grad), None, None
        weight = torch.zeros_like(total).index_put_((place,), grad, accumulate=True)
        result = torch.empty_like(logits)
        size, vocab = _part(logits), logits.shape[1]
        for start in range(0, len(logits), size):
            part = (logits[start : start + size] - total[start : start + size, None]).exp_().mul_(-weight[start : start + size, None])
            # Tokens of other parts add 0 to the first logit, because boolean indexing would synchronise with the device.
            inside = (place >= start) & (place < start + size)
            column = torch.where(inside, (place - start) * vocab + targets, 0)
            part.view(-1).index_put_((column,), torch.where(inside, grad, 0.0), accumulate=True)
            result[start : start + size] = part
        return result, None, None


def _recorded_gradient(logits: Tensor, targets: Tensor, place: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient with respect to the logits, ``(B * T, V)``, with operations that autograd records."""
    weight = torch.zeros(len(logits), dtype=grad.dtype, device=grad.device).index_put((place,), grad, accumulate=True)
    result = -weight[:, None] * logits.to(grad.dtype).softmax(-1)
    return result.index_put((place, targets), grad, accumulate=True).to(logits.dtype)


def _part(logits: Tensor) -> int:
    """Return the number of rows of ``(B * T, V)`` logits that are converted at once."""
    return max(1, (CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK) // logits.shape[1])
