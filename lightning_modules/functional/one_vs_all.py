"""The loss of queries against all entities, in chunks of entities and without keeping the scores.

Shapes: B queries, E entities, P true tails, W width of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from malleable.lightning_modules.functional.flows import Vectors

Kind = Literal["sigmoid", "softmax"]
# Scores kept at once: a chunk that stays in a processor's cache, and one that fills a GPU.
CHUNK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}


def one_vs_all_loss(
    query: Vectors,
    key: Vectors,
    target: Tensor,
    target_row: Tensor,
    row_weight: Tensor,
    *,
    kind: Kind = "sigmoid",
    smoothing: float = 0.0,
    normaliser: Tensor | float = 1.0,
    chunk_scores: int | None = None,
) -> Tensor:
    """Sum of cross-entropies of queries against all entities, over the ``normaliser``.

        sum_i w_i [ Phi(s_i) - smoothing / E sum_e s_ie ] - (1 - smoothing) sum_p s_p

    with ``Phi = sum_e softplus`` (sigmoid) or ``logsumexp`` (softmax). Where gradient is wanted it is taken on the way, so that no
    chunk is computed twice (softmax: once more for its normaliser).

    Args:
        query: ``(B, W)``.
        key: ``(E, W)``.
        target: ``(P,)`` true tails.
        target_row: ``(P,)`` the query of each.
        row_weight: ``(B,)`` w: the true tails of each query, so that grouping identical queries changes nothing; 0 leaves a query out.
        kind: Each entity by itself, or all against each other.
        smoothing: Share of the labels spread evenly over all entities.
        normaliser: What the sum is divided by.
        chunk_scores: Most scores to keep at a time; default: by device.
    """
    chunk = max(1, (chunk_scores or default_chunk(query.vector.device)) // max(1, len(query.vector)))
    sides = Vectors(*map(_full, query)), Vectors(*map(_full, key))
    scale = torch.as_tensor(normaliser, dtype=sides[0].vector.dtype, device=sides[0].vector.device).reciprocal()
    task = _Task(target, target_row, row_weight.to(scale.dtype), kind, smoothing, scale, chunk, torch.is_grad_enabled())
    # The products keep full precision under mixed precision: ranks hang on small differences of large terms.
    with torch.autocast(query.vector.device.type, enabled=False):
        return cast("Tensor", _OneVsAll.apply(*sides[0], *sides[1], task))  # type: ignore[no-untyped-call]


def default_chunk(device: torch.device) -> int:
    """Scores to keep at a time on a device."""
    return CHUNK_SCORES.get(device.type, CHUNK_SCORES["cuda"])


class _Task(NamedTuple):
    """What the loss is of, besides the vectors."""

    target: Tensor
    target_row: Tensor
    row_weight: Tensor
    kind: Kind
    smoothing: float
    scale: Tensor
    chunk: int
    gradient: bool


class _OneVsAll(torch.autograd.Function):
    """Loss and gradients chunk by chunk; the gradients wait for their factor."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, query_bias: Tensor | None, key: Tensor, key_bias: Tensor | None, task: _Task) -> Tensor:
        sides = Vectors(query, query_bias), Vectors(key, key_bias)
        wanted = [task.gradient and needed for needed in ctx.needs_input_grad[:4]]
        grads = [torch.zeros_like(part) if want and part is not None else None for want, part in zip(wanted, (*sides[0], *sides[1]), strict=True)]
        weight = task.row_weight * task.scale
        # A query's weight goes to its vector: it is narrower than its scores.
        weighted = query * weight[:, None]
        total = query.new_zeros(())
        normaliser = _log_normaliser(*sides, task.chunk) if task.kind == "softmax" else None
        for rows, cells in _chunks(task, len(key)):
            scores = _scores(*sides, rows)
            total -= (1 - task.smoothing) * task.scale * scores[cells].sum()
            if task.smoothing:
                total -= task.smoothing / len(key) * (scores.sum(1) @ weight)
            if normaliser is None:
                total += F.softplus(scores).sum(1) @ weight
            if any(wanted):
                residual = scores.sigmoid_() if normaliser is None else scores.sub_(normaliser[:, None]).exp_()
                if task.smoothing:
                    residual.sub_(task.smoothing / len(key))
                residual.index_put_(cells, (task.smoothing - 1) / task.row_weight[cells[0]], accumulate=True)
                _add_gradients(grads, residual, weighted, weight, key, rows)
        if normaliser is not None:
            total += normaliser @ weight
        if grads[0] is not None:
            grads[0].mul_(weight[:, None])
        if grads[1] is not None:
            grads[1].mul_(weight)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were handed out already; compute the loss again instead of retain_graph=True")
        # Handed out, not kept: what nobody else holds becomes the parameter's gradient without a copy.
        grads, ctx.grads = ctx.grads, None
        if factor.device.type != "cpu" or factor.item() != 1:
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        return (*grads, None)


def _full(part: Tensor | None) -> Tensor | None:
    return part.float() if part is not None and part.dtype in (torch.bfloat16, torch.float16) else part


def _scores(query: Vectors, key: Vectors, rows: slice) -> Tensor:
    """Scores of some entities, in memory of their own."""
    columns = key.vector[rows].T
    scores = query.vector @ columns if key.bias is None else torch.addmm(key.bias[rows], query.vector, columns)
    return scores if query.bias is None else scores.add_(query.bias[:, None])


def _log_normaliser(query: Vectors, key: Vectors, chunk: int) -> Tensor:
    """``logsumexp`` of each query's scores."""
    total = torch.full_like(query.vector[:, 0], -torch.inf)
    for start in range(0, len(key.vector), chunk):
        total = torch.logaddexp(total, _scores(query, key, slice(start, start + chunk)).logsumexp(1))
    return total


def _chunks(task: _Task, entities: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """The entities in chunks, and the cells ``(row, column)`` of each chunk's true tails."""
    if task.chunk >= entities:
        yield slice(0, entities), (task.target_row, task.target)
        return
    order = task.target.argsort(stable=True)
    starts = range(0, entities, task.chunk)
    bounds = torch.searchsorted(task.target[order], torch.tensor([*starts, entities], device=order.device)).tolist()
    for number, start in enumerate(starts):
        here = order[bounds[number] : bounds[number + 1]]
        yield slice(start, min(start + task.chunk, entities)), (task.target_row[here], task.target[here] - start)


def _add_gradients(grads: Sequence[Tensor | None], residual: Tensor, weighted: Tensor, weight: Tensor, key: Tensor, rows: slice) -> None:
    """Add a chunk's part to the gradients of queries, and set those of its entities."""
    query, query_bias, entity, entity_bias = grads
    if query is not None:
        query.addmm_(residual, key[rows])
    if query_bias is not None:
        query_bias.add_(residual.sum(1))
    if entity is not None:
        torch.mm(residual.T, weighted, out=entity[rows])
    if entity_bias is not None:
        torch.mv(residual.T, weight, out=entity_bias[rows])
