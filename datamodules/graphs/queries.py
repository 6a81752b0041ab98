"""Datasets of queries to a graph, which create batches by indexing arrays, without Python objects for rows.

Shapes: Q queries, K lists or distinct queries, B rows of a batch, P true tails, F known answers, R original relations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malleable.datamodules.batch import QueryBatch
from malleable.datamodules.sources.graphs.base import Ints, pack

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Lists:
    """Ragged integer lists, concatenated.

    Attributes:
        offsets: ``(K + 1,)``: list ``k`` is ``values[offsets[k]:offsets[k + 1]]``.
        values: All values.
    """

    offsets: Ints
    values: Ints

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.offsets) - 1

    def lengths(self) -> Ints:
        """Return the length of each list."""
        return np.diff(self.offsets)

    def take(self, chosen: Ints) -> tuple[Ints, Ints]:
        """Return the concatenated values of the lists ``chosen``, and for each value the position of its list in ``chosen``, ``(F,)`` each.

        Args:
            chosen: ``(B,)`` indices of lists; -1 gives an empty list.
        """
        start = self.offsets[chosen]
        place, row = spans(start, np.where(chosen < 0, 0, self.offsets[chosen + 1] - start))
        return self.values[place], row


@dataclass(frozen=True)
class Answers:
    """Known answers of all queries, over all splits.

    Attributes:
        keys: ``(K,)`` codes of the queries, ``head * 2R + relation``, in ascending order.
        tails: Distinct answers of each query.
        num_relations: 2R.
    """

    keys: Ints
    tails: Lists
    num_relations: int

    @classmethod
    def of(cls, queries: Ints, num_relations: int) -> Answers:
        """Collect the distinct answers of queries with targets, ``(Q, 3)``."""
        _, distinct = np.unique(pack(queries, int(queries[:, [0, 2]].max(initial=0)) + 1, num_relations), return_index=True)
        keys, tails = group(queries[distinct], num_relations)
        return cls(keys, tails, num_relations)

    def find(self, head: Ints, relation: Ints) -> Ints:
        """Return the index in :attr:`tails` of each query ``(head, relation, ?)``; -1 if no answer is known or the relation is -1. All ``(B,)``."""
        code = head.astype(np.int64) * self.num_relations + relation
        place = np.minimum(np.searchsorted(self.keys, code), len(self.keys) - 1)
        return np.where((self.keys[place] == code) & (relation >= 0), place, -1)

    def relations(self, head: Ints, tail: Ints) -> tuple[Ints, Ints]:
        """Return the known original relations of each pair of head and tail, ``(B,)`` each, and the position of the pair of each relation.

        Returns:
            Pair of arrays ``(F,)``: relations, and positions in ``head`` and ``tail``.
        """
        code = head.astype(np.int64) * self.num_relations
        first, end = (np.searchsorted(self.keys, code + relation) for relation in (0, self.num_relations // 2))
        place, row = spans(first, end - first)
        values, which = self.tails.take(place)
        hit = which[values == tail[row[which]]]
        return self.keys[place[hit]] % self.num_relations, row[hit]


def spans(start: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Return the concatenated ranges ``start[i] .. start[i] + counts[i] - 1``, and the index ``i`` of the range of each number."""
    row = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(row)) + (start - np.cumsum(counts) + counts)[row], row


def group(queries: Ints, num_relations: int) -> tuple[Ints, Lists]:
    """Group equal queries.

    Args:
        queries: ``(Q, 3)`` of head, relation, target.
        num_relations: 2R.

    Returns:
        Codes ``head * 2R + relation`` of the distinct queries, ``(K,)``, in ascending order; and the targets of each code, in the order of
        ``queries``.
    """
    code = queries[:, 0].astype(np.int64) * num_relations + queries[:, 1]
    order = np.argsort(code, kind="stable")
    keys, counts = np.unique(code, return_counts=True)
    return keys, Lists(np.concatenate([[0], np.cumsum(counts)]), queries[order, 2])


class QueryRows:
    """Dataset with one query in each row, with at most one true tail.

    :class:`~malleable.datamodules.loading.PhasedLoader` calls :meth:`make_batch`. With a ``torch.utils.data.DataLoader``, load positions:
    ``DataLoader(range(len(rows)), batch_size=128, collate_fn=lambda positions: rows.make_batch(torch.tensor(positions)))``.

    Args:
        queries: ``(Q, 3)`` of head, relation, target. For prediction, all rows have either the target -1, or the relation -1 and the tail as target.
        sample_id: ``(Q,)`` ids of the rows.
        answers: Known answers, which are added to batches.
    """

    def __init__(self, queries: Ints, sample_id: Ints, answers: Answers | None = None) -> None:
        self.queries = queries
        self.sample_id = sample_id
        self.answers = answers
        self._open = bool(len(queries)) and int(queries[0].min()) < 0
        self._known = None if answers is None else answers.find(queries[:, 0], queries[:, 1])

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    def row_tokens(self) -> Ints:
        """Return the number of true tails of each row."""
        return np.full(len(self), 0 if self._open else 1)

    def make_batch(self, rows: Tensor) -> QueryBatch:
        """Return the batch of these rows, given by positions ``(B,)``."""
        index = rows.numpy()
        head, relation, target = torch.from_numpy(self.queries[index].T.astype(np.int64, order="C"))
        known, known_row = self._known_answers(index)
        return QueryBatch(
            sample_id=_tensor(self.sample_id[index]),
            head=head,
            relation=relation,
            target=target[:0] if self._open else target,
            target_row=torch.arange(0 if self._open else len(index)),
            known=_tensor(known),
            known_row=_tensor(known_row),
            tail=target if self._open else None,
            one_each=not self._open,
        )

    def _known_answers(self, index: Ints) -> tuple[Ints, Ints]:
        """Return the known answers (entities, or relations for queries of relations) of the queries ``index``, and their rows in ascending order."""
        if self.answers is None or self._known is None:
            return _NONE, _NONE
        known, row = self.answers.tails.take(self._known[index])
        if not self._open:
            return known, row
        heads, relations, tails = self.queries[index].T
        of_relations = np.flatnonzero(relations < 0)
        found, which = self.answers.relations(heads[of_relations], tails[of_relations])
        known, row = np.concatenate([known, found]), np.concatenate([row, of_relations[which]])
        order = np.argsort(row, kind="stable")
        return known[order], row[order]


class GroupedQueries:
    """Dataset with one row for each distinct training query, with all its true tails; repeated triples give repeated tails.

    The ``sample_id`` of a row is that of its first query.

    Args:
        queries: ``(Q, 3)`` of head, relation, target.
        sample_id: ``(Q,)`` ids of the queries, ascending.
        num_relations: 2R.
    """

    def __init__(self, queries: Ints, sample_id: Ints, num_relations: int) -> None:
        self.keys, self.targets = group(queries, num_relations)
        code = queries[:, 0].astype(np.int64) * num_relations + queries[:, 1]
        self.sample_id = sample_id[np.unique(code, return_index=True)[1]]
        self.num_relations = num_relations

    def __len__(self) -> int:
        """Return the number of distinct queries."""
        return len(self.keys)

    def row_tokens(self) -> Ints:
        """Return the number of true tails of each row."""
        return self.targets.lengths()

    def make_batch(self, rows: Tensor) -> QueryBatch:
        """Return the batch of these rows, given by positions ``(B,)``."""
        index = rows.numpy()
        head, relation = np.divmod(self.keys[index], self.num_relations)
        target, target_row = self.targets.take(index)
        none = _tensor(_NONE)
        return QueryBatch(_tensor(self.sample_id[index]), _tensor(head), _tensor(relation), _tensor(target), _tensor(target_row), none, none)


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
