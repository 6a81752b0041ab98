"""Filtered ranks of true tails among all entities, and their means.

Shapes: B queries, E entities, P true tails, F known tails, R relations without reciprocals. Ranks start at 1. Queries with a negative
``sample_id`` are padding and are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.lightning_modules.metrics.ranking import RESOLUTION, Ties, check_ks, tie_weight
from malleable.lightning_modules.metrics.row_ranks import RowRanks

# Number of scores compared at once: 4 MB fit the cache of a CPU (measured), 256 MB on an accelerator (not measured; benchmark `kg_ranking.py`).
COMPARED = {"cpu": 1 << 20, "cuda": 1 << 26}
EXACT = 1 << 24  # float32 represents all integers up to this exactly


class QueryEntities(NamedTuple):
    """Entities that belong to queries, concatenated.

    Attributes:
        entity: ``(P,)`` entities.
        row: ``(P,)`` query of each entity; ``None``: one entity for each query, in order.
    """

    entity: Tensor
    row: Tensor | None


def filtered_ranks(scores: Tensor, true: QueryEntities, known: QueryEntities, ties: Ties = "pessimistic") -> Tensor:
    """Rank each true tail among the entities that are not known answers: ``1 + #greater + weight * #ties``.

    Args:
        scores: ``(B, E)``.
        true: ``(P,)`` true tails; several true tails of one query are ranked independently.
        known: ``(F,)`` known answers, which are left out of the ranking; distinct within a query, with or without the ranked tail.
        ties: Rank among entities of equal score; the weight is 0 (``optimistic``), 1/2 (``realistic``) or 1 (``pessimistic``). With ``realistic``,
            figures such as the reciprocal rank are computed from the mean rank of the tied entities.

    Returns:
        ``(P,)`` float64; fractional with ``realistic``.

    Raises:
        ValueError: If a score is nan: all comparisons with it would be false, and the rank would be 1.

    Source:
        Bordes et al. (2013), Translating Embeddings for Modeling Multi-relational Data, section 4.2 (filtered ranks).
    """
    check_scores(scores)
    return _ranks(scores, true, known, ties)


def _ranks(scores: Tensor, true: QueryEntities, known: QueryEntities, ties: Ties) -> Tensor:
    """Compute :func:`filtered_ranks` without the check of the scores; with one true tail for each query there is no synchronisation."""
    weight = tie_weight(ties)
    if true.row is not None and true.row.device.type == "cpu" and _one_each(true.row, len(scores)):
        true = QueryEntities(true.entity, None)
    row = torch.arange(len(scores), device=scores.device) if true.row is None else true.row
    own = scores[row, true.entity]
    place, entity = _known_of(true, known, len(scores))
    others = scores[row[place], entity]
    bar, real = own[place], entity != true.entity[place]
    counts = torch.zeros_like(own, dtype=torch.double)
    for compare, share, self_counted in ((torch.ge, weight, 1), (torch.gt, 1 - weight, 0)):
        if share:
            count = _count(scores, own, true.row, compare).double() - self_counted
            count.index_add_(0, place, -(compare(others, bar) & real).double())
            counts += share * count
    return 1 + counts


def check_scores(scores: Tensor) -> None:
    """Check that no score of ``(B, N)`` is nan.

    Raises:
        ValueError: If a score is nan.
    """
    # The sum is nan if a term is nan, or if there are infinities of both signs; only then all scores are checked.
    if bool(scores.sum().isnan()) and bool(scores.isnan().any()):
        _refuse_invalid(int(scores.isnan().any(1).sum()), len(scores))


def _refuse_invalid(invalid: int, queries: int) -> None:
    if invalid:
        raise ValueError(f"{invalid} of {queries} queries have nan scores: training has diverged; use a lower learning rate")


class LinkPredictionMetrics(Metric):
    """Mean rank, mean reciprocal rank and hits of filtered ranks, for both directions together and separately.

    Queries with relations ``0..R-1`` predict tails, those with the reciprocals ``R..2R-1`` heads. The state contains integer sums for each relation,
    so that the figures do not depend on the order of queries or the number of devices. After ``compute``, ``relation_figures`` has the figures of
    each relation, ``(2R,)`` each, and under ``queries`` the number of queries. Updates do not synchronise with the device, so that nan scores are
    reported by ``compute``.

    Args:
        num_relations: 2R.
        ks: Cut-offs k of the hits. The results have the keys ``mr``, ``mrr``, ``hits_<k>``, ``mrr_tail`` and ``mrr_head``.
        ties: Policy for equal scores, see :func:`filtered_ranks`.

    Raises:
        ValueError: If an argument is out of range.
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    invalid: Tensor
    row_ranks: RowRanks | None = None

    def __init__(self, num_relations: int, ks: Sequence[int] = (1, 3, 10), ties: Ties = "pessimistic") -> None:
        super().__init__()
        if num_relations < 2 or num_relations % 2:
            raise ValueError(f"num_relations must count relations and their reciprocals, an even number >= 2, got {num_relations}")
        tie_weight(ties)
        self.ks = check_ks(ks)
        self.ties: Ties = ties
        self.names = ("mr", "mrr", *(f"hits_{k}" for k in self.ks))
        self.relation_figures: dict[str, Tensor] = {}
        # Number of queries, twice the rank (ranks may be half-integers), reciprocal rank in units of 1 / RESOLUTION, hits.
        self.add_state("sums", torch.zeros(num_relations, 1 + len(self.names), dtype=torch.long), dist_reduce_fx="sum")
        # Number of queries with nan scores.
        self.add_state("invalid", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, true: QueryEntities, known: QueryEntities, relation: Tensor, sample_id: Tensor) -> None:
        """Add queries.

        Args:
            scores: ``(B, E)``, higher is better.
            true: ``(P,)`` true tails.
            known: ``(F,)`` known answers, which are left out of the ranking.
            relation: ``(B,)`` relation of each query.
            sample_id: ``(B,)`` ids; rows with a negative id are skipped.
        """
        ids = sample_id
        ranks = _ranks(scores, true, known, self.ties)
        if true.row is not None:
            ids, relation = sample_id[true.row], relation[true.row]
        real = ids >= 0
        if self.row_ranks is not None:
            self.row_ranks.add(ids, true.entity, ranks)
        columns = [torch.ones_like(ranks), 2 * ranks, (RESOLUTION / ranks).round(), *((ranks <= k).double() for k in self.ks)]
        added = torch.zeros_like(self.sums).index_add_(0, relation, torch.stack(columns, 1).long() * real[:, None])
        # Not in place: a state that was reset in inference mode cannot be modified outside it.
        self.sums = self.sums + added
        self.invalid = self.invalid + (scores.amax(1).isnan() & (sample_id >= 0)).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the figures over all queries of all processes; ``nan`` without queries; figures of a direction only if it has queries.

        Raises:
            ValueError: If a score was nan.
        """
        sums = self.sums.cpu()
        _refuse_invalid(int(self.invalid), int(sums[:, 0].sum()))
        self.relation_figures = self._figures(sums) | {"queries": sums[:, 0]}
        tail, head = sums.chunk(2)
        figures = self._figures(sums.sum(0))
        figures |= {f"mrr_{name}": self._figures(part.sum(0))["mrr"] for name, part in (("tail", tail), ("head", head)) if part[:, 0].any()}
        return {name: value.float().to(self.device) for name, value in figures.items()}

    def _figures(self, sums: Tensor) -> dict[str, Tensor]:
        units = torch.tensor([0.5, 1 / RESOLUTION, *[1.0] * len(self.ks)], dtype=torch.double)
        means = sums[..., 1:] * units / sums[..., :1]
        return dict(zip(self.names, means.unbind(-1), strict=True))


def _count(scores: Tensor, own: Tensor, row: Tensor | None, compare: Callable[..., Tensor]) -> Tensor:
    """Count the entities whose scores satisfy ``compare`` with the score of the true tail, ``(P,)``."""
    entities = scores.shape[1]
    size = max(1, COMPARED.get(scores.device.type, COMPARED["cuda"]) // max(1, entities))
    buffer = torch.empty(min(size, len(own)), entities, dtype=torch.float32, device=scores.device)
    counts = torch.empty(len(own), dtype=torch.double if entities > EXACT else torch.float32, device=scores.device)
    for start in range(0, len(own), size):
        part = slice(start, min(start + size, len(own)))
        rows = scores[part] if row is None else scores[row[part]]
        # Results of the comparison are stored as floats, which are summed several times faster than booleans.
        counts[part] = compare(rows, own[part, None], out=buffer[: len(rows)]).sum(1, dtype=counts.dtype)
    return counts


def _known_of(true: QueryEntities, known: QueryEntities, num_rows: int) -> tuple[Tensor, Tensor]:
    """Pair each true tail with the known answers of its query; return indices of true tails, and known entities."""
    assert known.row is not None
    if true.row is None:
        return known.row, known.entity
    order = known.row.argsort(stable=True)
    numbers = torch.bincount(known.row, minlength=num_rows)
    starts = (numbers.cumsum(0) - numbers)[true.row]
    lengths = numbers[true.row]
    place = torch.arange(len(true.row), device=lengths.device).repeat_interleave(lengths)
    within = torch.arange(len(place), device=lengths.device) - (lengths.cumsum(0) - lengths)[place]
    return place, known.entity[order[starts[place] + within]]


def _one_each(row: Tensor, num_rows: int) -> bool:
    """Return whether each query has exactly one true tail, in order."""
    return len(row) == num_rows and bool((row == torch.arange(num_rows, device=row.device)).all())
