"""Log-probabilities of selected tokens from hidden states, without the logits of all positions.

The language-model head, and the log-softmax over the vocabulary, run on some positions at a time. If gradients are needed, the logits of a chunk are
computed again in the backward pass instead of being stored. Logits and their gradient therefore need the memory of one chunk.

Shapes: P positions, V vocabulary, d width of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from malleable.lightning_modules.functional.language.selected_logps import selected_token_logps
from malleable.lightning_modules.functional.precision import autocast_dtype
from malleable.lightning_modules.functional.ranks import is_sharded, largest_over_ranks

# Maximum number of logits that are stored for the backward pass. Larger numbers are computed in chunks, which costs one more product with the weights
# of a trained head. 64 MB of float32 on a CPU and 512 MB of bfloat16 on an accelerator: short answers, e.g. titles of items, stay below.
LIMIT = 1 << 24
ACCELERATOR_LIMIT = 1 << 28
# Number of logits of a chunk: 16 MiB of float32 on a CPU; 256 MiB on an accelerator, i.e. 512 positions of a vocabulary of 128 k.
CHUNK = 1 << 22
ACCELERATOR_CHUNK = 1 << 26


@dataclass(frozen=True)
class HeadForm:
    """Function from the output of the language-model head to logits: ``scale * output``, or ``cap * tanh(scale * output / cap)``.

    Attributes:
        scale: Factor of the output, e.g. ``logit_scale`` of Cohere and ``1 / logits_scaling`` of Granite.
        cap: Bound of the logits, e.g. ``final_logit_softcapping`` of Gemma 2; infinite without a bound.
    """

    scale: float = 1.0
    cap: float = math.inf

    def logits(self, output: Tensor) -> Tensor:
        """Compute logits from the output of the head, elementwise."""
        if self.scale != 1.0:
            output = output * self.scale
        return output if math.isinf(self.cap) else torch.tanh(output / self.cap) * self.cap


def vocab_size(model: Any) -> int:
    """Return the number of logits of a position of a Hugging Face model; weights can be packed or sharded, so the configuration states it."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(config.vocab_size)


def exceeds_limit(model: nn.Module, positions: int, device: torch.device) -> bool:
    """Return whether this many positions have so many logits that they are computed in chunks; with sharded weights, on any rank."""
    if is_sharded(model):
        # Each call of the head gathers its weights, so that all ranks must call it equally often.
        positions = largest_over_ranks(positions, device)
    return positions * vocab_size(model) > (LIMIT if device.type == "cpu" else ACCELERATOR_LIMIT)


def head_logps(model: Any, states: Tensor, targets: Tensor, form: HeadForm) -> Tensor:
    """Compute the log-probability of one token for each hidden state.

    Equals ``selected_token_logps(form.logits(head(states)), targets)`` for the head of the model. The head is called as a module, so that hooks and
    adapters apply, also when it is called again in the backward pass. For a linear layer without bias and hooks, nothing is computed twice if its
    weights are frozen: the gradient of the hidden states is computed in the forward pass. If they are trained, their gradient is accumulated in
    place.

    Second derivatives are supported (``create_graph=True``).

    Args:
        model: Hugging Face causal language model.
        states: ``(P, d)``, inputs of its head.
        targets: ``(P,)`` int64.
        form: Function from the output of the head to logits.

    Returns:
        ``(P,)`` float32 (float64 for float64 states), in nats.
    """
    head = model.get_output_embeddings()
    size = max(1, (CHUNK if states.device.type == "cpu" else ACCELERATOR_CHUNK) // vocab_size(model))
    dtype = _product_dtype(states)
    # Small probabilities underflow in float16, where the gradient must be scaled before it is rounded.
    if form == HeadForm() and dtype != torch.float16 and _is_plain(head):
        plain: Tensor = _PlainHead.apply(states, head.weight, targets, size, dtype, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return plain
    modes = [(module, module.training) for module in head.modules()]
    random = any(mode and isinstance(module, nn.Dropout) and module.p > 0 for module, mode in modes)

    def part(states: Tensor, targets: Tensor) -> Tensor:
        # The backward pass can come after a context that changes modes, e.g. one that disables dropout.
        with _training_modes(modes):
            return selected_token_logps(form.logits(head(states[None])), targets[None])[0]

    parts = list(zip(torch.split(states, size), torch.split(targets, size), strict=True))
    count = largest_over_ranks(len(parts), states.device) if is_sharded(model) else len(parts)
    # A rank with fewer chunks repeats one position, whose result is multiplied by 0, so that it gathers sharded weights as often as the others.
    idle = [(states[:1], targets[:1])] * (count - len(parts))
    if torch.is_grad_enabled():
        found = [checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=random) for arguments in parts + idle]
    else:
        found = [part(*arguments) for arguments in parts + idle]
    logps = torch.cat(found[: len(parts)])
    return logps + 0 * torch.cat(found[len(parts) :]).sum() if idle else logps


def _product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with ``states``."""
    return states.dtype if states.dtype == torch.float64 else autocast_dtype(states.device) or states.dtype


def _is_plain(head: nn.Module) -> bool:
    """Return whether a head is a linear layer without bias, whose call does nothing but multiply by its whole weights."""
    layer: Any = head
    if type(layer) is not nn.Linear or getattr(layer, "bias", None) is not None or "forward" in vars(layer):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    sharded = any(hasattr(layer.weight, mark) for mark in ("ds_id", "device_mesh"))
    return not any(hooks) and not sharded and bool(layer.weight.ndim == 2)


@contextmanager
def _training_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Set the training mode of modules, and restore it."""
    previous = [(module, module.training) for module, _ in modes]
    for module, mode in modes:
        module.training = mode
    try:
        yield
    finally:
        for module, mode in previous:
            module.training = mode


class _PlainHead(torch.autograd.Function):
    """Log-probabilities ``(P,)`` of the tokens ``targets`` by a linear layer without bias."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, size: int, dtype: torch.dtype, gradient: bool) -> Tensor:
        """Return the log-probabilities.

        Args:
            ctx: Context of autograd.
            states: ``(P, d)``.
            weight: ``(V, d)``.
            targets: ``(P,)``.
            size: Number of positions of a chunk.
            dtype: Dtype of the matrix products; the log-softmax is computed in float32.
            gradient: Whether gradients may be needed.
        """
        ctx.size, ctx.dtype = size, dtype
        # With frozen weights, the gradient of each log-probability with respect to its state needs no other gradient.
        frozen = gradient and ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        slope = torch.empty_like(states, dtype=dtype) if frozen else None
        matrix = weight.to(dtype)
        logps, total = [], []
        for rows in _chunks(len(states), size):
            scores, own = _full(states[rows].to(dtype) @ matrix.T), targets[rows, None]
            total.append(scores.logsumexp(1, keepdim=True))
            logps.append((scores.gather(1, own) - total[-1])[:, 0])
            if slope is not None:
                residual = _residual(scores, total[-1], own, torch.ones_like(total[-1]))
                torch.mm(residual.to(dtype), matrix, out=slope[rows])
        ctx.save_for_backward(states, weight, targets, torch.cat(total), slope)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states and weights."""
        states, weight, targets, total, slope = ctx.saved_tensors
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # Second derivatives (create_graph=True) need operations that autograd records, with all logits.
            found = _recorded_gradients(states, weight, targets, grad, ctx.dtype, (wants_states, wants_weight))
            return (*found, None, None, None, None)
        if slope is not None:
            return ((slope * grad[:, None]).to(states.dtype), None, None, None, None, None)
        matrix = weight.to(ctx.dtype)
        grad_states = torch.empty_like(states) if wants_states else None
        # As in accumulation over batches, chunks are added in the dtype of the weights.
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        for rows in _chunks(len(states), ctx.size):
            left = states[rows].to(ctx.dtype)
            residual = _residual(_full(left @ matrix.T), total[rows], targets[rows, None], grad[rows, None]).to(ctx.dtype)
            if grad_states is not None:
                grad_states[rows] = residual @ matrix
            if grad_weight is not None and grad_weight.dtype == ctx.dtype:
                grad_weight.addmm_(residual.T, left)
            elif grad_weight is not None:
                grad_weight += residual.T @ left
        return grad_states, grad_weight, None, None, None, None


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` positions; one empty slice if there are no positions."""
    return (slice(start, start + size) for start in range(0, max(count, 1), size))


def _full(scores: Tensor) -> Tensor:
    """Convert to float32; float64 is not converted."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _residual(scores: Tensor, total: Tensor, own: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient with respect to the logits ``scores``, which are overwritten; ``total``, ``own`` and ``grad`` have one column."""
    return scores.sub_(total).exp_().mul_(-grad).scatter_add_(1, own, grad)


def _recorded_gradients(
    states: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, dtype: torch.dtype, wanted: tuple[bool, bool]
) -> list[Tensor | None]:
    """Compute the gradients of states and weights with operations that autograd records."""
    logps = selected_token_logps(linear(states.to(dtype), weight.to(dtype))[None], targets[None])[0]
    inputs = [tensor for tensor, needed in zip((states, weight), wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(logps, inputs, grad, create_graph=True))
    return [next(found) if needed else None for needed in wanted]
