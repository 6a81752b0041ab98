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

from malleable.lightning_modules.functional.graphs.interaction import Vectors, product
from malleable.lightning_modules.functional.precision import full, full_precision

Kind = Literal["sigmoid", "softmax"]
KeyOf = Callable[[Tensor], Vectors]
# Numbers of a chunk: what stays in a processor's cache (measured), and 256 MB on an accelerator (not measured; see `kg_epoch.py --chunk`).
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


@full_precision
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
        row_weight: ``(B,)`` w: the true tails of each query, so that grouping identical queries changes nothing; 0 leaves a query and its true
            tails out.
        kind: Each entity by itself, or all against each other.
        smoothing: Share of the labels spread evenly over all entities.
        normaliser: What the sum is divided by.
        chunk: Most entities at a time; default: as many as the device holds well.
    """
    if chunk is None:
        chunk = max(64, CHUNK.get(table.device.type, CHUNK["cuda"]) // max(len(query.vector), table.shape[1]))
    query = query.full()
    row_weight = row_weight.to(query.vector.dtype)
    # A number is filled in on the device: copying it there would wait for the device.
    divisor = normaliser.to(row_weight) if isinstance(normaliser, Tensor) else row_weight.new_full((), normaliser)
    counted = row_weight > 0
    label = (smoothing - 1) * counted.to(row_weight.dtype)[target_row]
    residual = label / row_weight.masked_fill(~counted, 1)[target_row]
    task = _Task(key_of, target, target_row, label, residual, row_weight, kind, smoothing, divisor.reciprocal(), chunk, torch.is_grad_enabled())
    return cast("Tensor", _OneVsAll.apply(*query, table, task))  # type: ignore[no-untyped-call]


class _Task(NamedTuple):
    """Arguments of the loss besides the queries and the table.

    ``label`` and ``residual`` are what each true tail subtracts from the loss and from its score's gradient; 0 where its query is left out.
    """

    key_of: KeyOf
    target: Tensor
    target_row: Tensor
    label: Tensor
    residual: Tensor
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
        for rows in _chunks(task, len(table)):
            leaf = table[rows].detach().requires_grad_(wanted[2])
            with torch.set_grad_enabled(wanted[2]):
                key = task.key_of(full(leaf))
            with torch.no_grad():
                scores = product(queries, key)
                cells = _cells(rows, len(table), task)
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
        if not _is_one(factor):
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        return (*grads, None)


def _is_one(factor: Tensor) -> bool:
    """Whether a CPU's factor is 1, which saves a pass over the gradients; reading another device's would wait for it."""
    return factor.device.type == "cpu" and factor.item() == 1


class _Cells(NamedTuple):
    """The true tails among the scores of a chunk: flat places, ``(P,)``, and labels and residuals, 0 for tails outside of the chunk."""

    place: Tensor
    label: Tensor
    residual: Tensor


def _cells(rows: slice, entities: int, task: _Task) -> _Cells:
    # No tail is left out by a mask: the number that remains would have to be read from the device.
    count = rows.stop - rows.start
    if count == entities:
        return _Cells(task.target_row * count + task.target, task.label, task.residual)
    column = (task.target - rows.start).clamp_(0, count - 1)
    inside = column + rows.start == task.target
    return _Cells(task.target_row * count + column, task.label * inside, task.residual * inside)


def _value(scores: Tensor, cells: _Cells, weight: Tensor, entities: int, task: _Task) -> Tensor:
    """A chunk's part of the loss, all but a softmax's normaliser."""
    value = task.scale * (scores.view(-1)[cells.place] @ cells.label)
    if task.smoothing:
        value -= task.smoothing / entities * (scores.sum(1) @ weight)
    if task.kind == "sigmoid":
        value += F.softplus(scores).sum(1) @ weight
    return value


def _residual(scores: Tensor, cells: _Cells, normaliser: Tensor | None, entities: int, task: _Task) -> None:
    """Turn scores into what is left of probabilities after the labels, in place: the gradient without the queries' weights."""
    if normaliser is None:
        scores.sigmoid_()
    else:
        scores.sub_(normaliser[:, None]).exp_()
    if task.smoothing:
        scores.sub_(task.smoothing / entities)
    scores.view(-1).index_add_(0, cells.place, cells.residual)


def _log_normaliser(query: Vectors, table: Tensor, task: _Task) -> Tensor:
    """``logsumexp`` of each query's scores."""
    parts = [product(query, task.key_of(full(rows))).logsumexp(1) for rows in torch.split(table, task.chunk)]
    return torch.stack(parts).logsumexp(0)


def _chunks(task: _Task, entities: int) -> Iterator[slice]:
    """The entities in chunks."""
    for start in range(0, entities, task.chunk):
        yield slice(start, min(start + task.chunk, entities))


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
