"""Cross-entropy of queries against all entities, in chunks of entities, without storing all scores.

Shapes: B queries, E entities, P true tails, W width of query and key vectors, n entities of a chunk.
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
# Scores of a chunk: 2 MB fit the cache of a CPU (measured), 256 MB on an accelerator (not measured; see the benchmark `kg_epoch.py --chunk`).
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
    """Compute the sum of the cross-entropies of queries against all entities, divided by ``normaliser``.

        sum_i w_i [ Phi(s_i) - smoothing / E sum_e s_ie ] - (1 - smoothing) sum_p s_p

    where ``s_ie`` is the score of query i and entity e, ``s_i`` are the scores of query i with all entities, ``s_p`` is the score of true tail p
    with its query, and ``Phi`` is ``sum_e softplus`` (sigmoid) or ``logsumexp`` (softmax).

    The gradient of a chunk of entities is computed before the next chunk is read. Therefore scores and keys of all entities are never stored, and
    scores are computed only once (with softmax, once more for ``logsumexp``).

    Args:
        query: Vectors ``(B, W)`` and biases ``(B,)`` of the queries.
        table: ``(E, ...)`` rows of the entities. Only these get a gradient, not other tensors that ``key_of`` uses.
        key_of: Maps rows of entities to key vectors, each row independently.
        target: ``(P,)`` true tails.
        target_row: ``(P,)`` query of each true tail.
        row_weight: ``(B,)`` weight w of each query: its number of true tails, so that grouping identical queries does not change the loss. Queries
            of weight 0 are left out, with their true tails.
        kind: ``sigmoid`` (binary cross-entropy of each entity) or ``softmax``.
        smoothing: Label smoothing: share of the labels that is distributed uniformly over all entities.
        normaliser: Divisor of the sum.
        chunk: Maximum number of entities scored at once. Default: chosen for the device.

    Returns:
        Scalar.
    """
    if chunk is None:
        chunk = max(64, CHUNK.get(table.device.type, CHUNK["cuda"]) // max(len(query.vector), table.shape[1]))
    query = query.full()
    row_weight = row_weight.to(query.vector.dtype)
    # `new_full` fills the number in on the device; a copy to the device would synchronise.
    divisor = normaliser.to(row_weight) if isinstance(normaliser, Tensor) else row_weight.new_full((), normaliser)
    counted = row_weight > 0
    label = (smoothing - 1) * counted.to(row_weight.dtype)[target_row]
    residual = label / row_weight.masked_fill(~counted, 1)[target_row]
    task = _Task(key_of, target, target_row, label, residual, row_weight, kind, smoothing, divisor.reciprocal(), chunk, torch.is_grad_enabled())
    return cast("Tensor", _OneVsAll.apply(*query, table, task))  # type: ignore[no-untyped-call]


class _Task(NamedTuple):
    """Arguments of the loss besides the queries and the table.

    For each true tail, ``label`` times its score is added to the loss, and ``residual`` is added to the gradient of its score. Both are ``(P,)``, and
    0 if the query is left out.
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
    """Loss and gradients, computed chunk by chunk in the forward pass; the backward pass scales the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, query_bias: Tensor | None, table: Tensor, task: _Task) -> Tensor:
        queries = Vectors(query, query_bias)
        wanted = [task.gradient and needed for needed in ctx.needs_input_grad[:3]]
        grads = [torch.zeros_like(part) if want and part is not None else None for want, part in zip(wanted[:2], queries, strict=True)]
        grads.append(torch.empty_like(table) if wanted[2] else None)
        weight = task.row_weight * task.scale
        # Weights multiply the queries, which are smaller than their scores.
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
            raise RuntimeError("this loss supports one backward pass only; compute the loss again instead of using retain_graph=True")
        # Drop the references: autograd takes over a gradient without a copy if there is no other reference to it.
        grads, ctx.grads = ctx.grads, None
        if not _is_one(factor):
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        return (*grads, None)


def _is_one(factor: Tensor) -> bool:
    """Return whether a factor on the CPU is 1, which saves a pass over the gradients; on other devices reading it would synchronise."""
    return factor.device.type == "cpu" and factor.item() == 1


class _Cells(NamedTuple):
    """Flat positions of the true tails in the scores of a chunk, ``(P,)``, with labels and residuals, which are 0 outside the chunk."""

    place: Tensor
    label: Tensor
    residual: Tensor


def _cells(rows: slice, entities: int, task: _Task) -> _Cells:
    # Tails outside the chunk are not removed by a mask: the number of remaining tails would have to be read from the device.
    count = rows.stop - rows.start
    if count == entities:
        return _Cells(task.target_row * count + task.target, task.label, task.residual)
    column = (task.target - rows.start).clamp_(0, count - 1)
    inside = column + rows.start == task.target
    return _Cells(task.target_row * count + column, task.label * inside, task.residual * inside)


def _value(scores: Tensor, cells: _Cells, weight: Tensor, entities: int, task: _Task) -> Tensor:
    """Compute the part of the loss that belongs to a chunk, without the normaliser of the softmax."""
    value = task.scale * (scores.view(-1)[cells.place] @ cells.label)
    if task.smoothing:
        value -= task.smoothing / entities * (scores.sum(1) @ weight)
    if task.kind == "sigmoid":
        value += F.softplus(scores).sum(1) @ weight
    return value


def _residual(scores: Tensor, cells: _Cells, normaliser: Tensor | None, entities: int, task: _Task) -> None:
    """Replace scores by probabilities minus labels in place: the gradient of the scores without the weights of the queries."""
    if normaliser is None:
        scores.sigmoid_()
    else:
        scores.sub_(normaliser[:, None]).exp_()
    if task.smoothing:
        scores.sub_(task.smoothing / entities)
    scores.view(-1).index_add_(0, cells.place, cells.residual)


def _log_normaliser(query: Vectors, table: Tensor, task: _Task) -> Tensor:
    """Compute the ``logsumexp`` of the scores of each query, ``(B,)``."""
    parts = [product(query, task.key_of(full(rows))).logsumexp(1) for rows in torch.split(table, task.chunk)]
    return torch.stack(parts).logsumexp(0)


def _chunks(task: _Task, entities: int) -> Iterator[slice]:
    """Yield the chunks of entities."""
    for start in range(0, entities, task.chunk):
        yield slice(start, min(start + task.chunk, entities))


def _row_gradient(out: Tensor, residual: Tensor, query: Vectors, key: Vectors, leaf: Tensor) -> None:
    """Write the gradient of the rows of a chunk to ``out``, given the gradient ``residual``, ``(n, B)``, of their unweighted scores."""
    if key.vector is leaf and key.bias is None:
        torch.mm(residual, query.vector, out=out)
        return
    assert query.bias is not None
    sides = [(key.vector, residual @ query.vector)]
    if key.bias is not None:
        sides.append((key.bias, residual.mv(query.bias)))
    (gradient,) = torch.autograd.grad([side for side, _ in sides], leaf, [grad for _, grad in sides])
    out.copy_(gradient)
