"""The loss of queries against all entities, in chunks of entities, without keeping the scores.

Shapes: B queries, E entities, P true tails, W width of the product, n entities of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from malleable.lightning_modules.functional.interaction import Vectors, full, product

Kind = Literal["sigmoid", "softmax"]
KeyOf = Callable[[Tensor], Vectors]
# Numbers of a chunk: what stays in a processor's cache, and what fills a GPU.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


def one_vs_all_loss(
    query: Vectors,
    table: Tensor,
    key_of: KeyOf,
    target: Tensor,
    target_row: Tensor,
    row_weight: Tensor,
    *,
    kind: Kind = "sigmoid",
    smoothing: float = 0.0,
    normaliser: Tensor | float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum of cross-entropies of queries against all entities, over the ``normaliser``.

        sum_i w_i [ Phi(s_i) - smoothing / E sum_e s_ie ] - (1 - smoothing) sum_p s_p

    with ``Phi = sum_e softplus`` (sigmoid) or ``logsumexp`` (softmax). Each chunk of entities goes from its rows to the gradient of its rows
    before the next one is read, so that neither scores nor keys of all entities are kept, and none are computed twice (softmax: once more for
    its normaliser).

    Args:
        query: ``(B, W)``.
        table: ``(E, ...)`` rows of the entities; gradient reaches it, and nothing else that ``key_of`` uses.
        key_of: Turns rows into the entities' side, row by row.
        target: ``(P,)`` true tails.
        target_row: ``(P,)`` the query of each.
        row_weight: ``(B,)`` w: the true tails of each query, so that grouping identical queries changes nothing; 0 leaves a query out.
        kind: Each entity by itself, or all against each other.
        smoothing: Share of the labels spread evenly over all entities.
        normaliser: What the sum is divided by.
        chunk: Most entities at a time; default: as many as the device holds well.
    """
    if chunk is None:
        chunk = max(64, CHUNK.get(table.device.type, CHUNK["cuda"]) // max(len(query.vector), table.shape[1]))
    query = query.full()
    scale = torch.as_tensor(normaliser, dtype=query.vector.dtype, device=table.device).reciprocal()
    task = _Task(key_of, target, target_row, row_weight.to(scale.dtype), kind, smoothing, scale, chunk, torch.is_grad_enabled())
    # The products keep full precision under mixed precision: ranks hang on small differences of large terms.
    with torch.autocast(table.device.type, enabled=False):
        return cast("Tensor", _OneVsAll.apply(*query, table, task))  # type: ignore[no-untyped-call]


class _Task(NamedTuple):
    """What the loss is of, besides the queries and the table."""

    key_of: KeyOf
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
    def forward(ctx: Any, query: Tensor, query_bias: Tensor | None, table: Tensor, task: _Task) -> Tensor:
        queries = Vectors(query, query_bias)
        wanted = [task.gradient and needed for needed in ctx.needs_input_grad[:3]]
        grads = [torch.zeros_like(part) if want and part is not None else None for want, part in zip(wanted[:2], queries, strict=True)]
        grads.append(torch.empty_like(table) if wanted[2] else None)
        weight = task.row_weight * task.scale
        # A query's weight goes to its vector: it is narrower than its scores.
        weighted = Vectors(query * weight[:, None], weight)
        total = query.new_zeros(())
        normaliser = _log_normaliser(queries, table, task) if task.kind == "softmax" else None
        for rows, cells in _chunks(task, len(table)):
            leaf = table[rows].detach().requires_grad_(wanted[2])
            with torch.set_grad_enabled(wanted[2]):
                key = task.key_of(full(leaf))
            with torch.no_grad():
                scores = product(queries, key)
                total += _value(scores, cells, weight, len(table), task)
                if any(wanted):
                    _residual(scores, cells, normaliser, len(table), task)
                if grads[0] is not None:
                    grads[0].addmm_(scores, key.vector)
                if grads[1] is not None:
                    grads[1].add_(scores.sum(1))
            if grads[2] is not None:
                _row_gradient(grads[2][rows], scores.T, weighted, key, leaf)
        if normaliser is not None:
            total += normaliser @ weight
        if grads[0] is not None:
            grads[0].mul_(weight[:, None])
        if grads[1] is not None:
            grads[1].mul_(weight)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were handed out already; compute the loss again instead of retain_graph=True")
        # Handed out, not kept: what nobody else holds becomes the parameter's gradient without a copy.
        grads, ctx.grads = ctx.grads, None
        if factor.device.type != "cpu" or factor.item() != 1:
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        return (*grads, None)


def _value(scores: Tensor, cells: tuple[Tensor, Tensor], weight: Tensor, entities: int, task: _Task) -> Tensor:
    """A chunk's part of the loss, all but a softmax's normaliser."""
    value = (task.smoothing - 1) * task.scale * scores[cells].sum()
    if task.smoothing:
        value -= task.smoothing / entities * (scores.sum(1) @ weight)
    if task.kind == "sigmoid":
        value += F.softplus(scores).sum(1) @ weight
    return value


def _residual(scores: Tensor, cells: tuple[Tensor, Tensor], normaliser: Tensor | None, entities: int, task: _Task) -> None:
    """Turn scores into what is left of probabilities after the labels, in place: the gradient without the queries' weights."""
    if normaliser is None:
        scores.sigmoid_()
    else:
        scores.sub_(normaliser[:, None]).exp_()
    if task.smoothing:
        scores.sub_(task.smoothing / entities)
    scores.index_put_(cells, (task.smoothing - 1) / task.row_weight[cells[0]], accumulate=True)


def _log_normaliser(query: Vectors, table: Tensor, task: _Task) -> Tensor:
    """``logsumexp`` of each query's scores."""
    parts = [product(query, task.key_of(full(rows))).logsumexp(1) for rows in torch.split(table, task.chunk)]
    return torch.stack(parts).logsumexp(0)


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


def _row_gradient(out: Tensor, residual: Tensor, query: Vectors, key: Vectors, leaf: Tensor) -> None:
    """Write the gradient of a chunk's rows, given that of its scores, ``(n, B)`` without the queries' weights."""
    if key.vector is leaf and key.bias is None:
        torch.mm(residual, query.vector, out=out)
        return
    assert query.bias is not None
    sides = [(key.vector, residual @ query.vector)]
    if key.bias is not None:
        sides.append((key.bias, residual.mv(query.bias)))
    (gradient,) = torch.autograd.grad([side for side, _ in sides], leaf, [grad for _, grad in sides])
    out.copy_(gradient)
