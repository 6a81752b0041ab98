"""Typed batches and the catalogue: the one vocabulary that data and modules share.

Shapes: B rows, P prompt tokens, K answers per row, A answer tokens, T tokens, L history items, S seen items, C candidates.
Of queries to a graph: P true tails, F known answers, R original relations. Item ids run from 0; -1 pads item lists.
A negative ``sample_id`` marks a row repeated only to fill a batch: metrics skip it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Self, TypedDict

import torch
from torch import Tensor

from malleable.datamodules.record import Record

WILDCARD = "?"
"""Stands in a written query for what it asks."""


class Batch(Record):
    """Rows with a stable identity.

    A subclass declares more fields by annotations, without ``@dataclass``. Float fields keep their dtype under every precision of the Trainer;
    a module that multiplies one with weights converts it first: ``batch.features.to(self.dtype)``.

    Attributes:
        sample_id: ``(B,)`` int64; the same row has the same id in every run; negative for padding rows.
    """

    sample_id: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sample_id)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with ``function`` applied to every tensor, also those of batches in fields."""
        changed: dict[str, Any] = {}
        for name in self.field_names():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changed[name] = function(value)
            elif isinstance(value, Batch):
                changed[name] = value.map(function)
        return self.replace(**changed)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """Return a copy on ``device``.

        Args:
            device: The target.
            non_blocking: Do not wait for the copies; default: wait only on devices where Lightning waits, the CPU and MPS.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type not in ("cpu", "mps")
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory."""
        return self.map(lambda tensor: tensor.pin_memory())


class PackedBatch(Batch):
    """Whole documents laid end to end in rows of one length; every token but a document's first is a target.

    Attributes:
        input_ids: ``(B, T)`` int64.
        document_ids: ``(B, T)`` int64; 0 is padding, equal numbers belong to one document.
        position_ids: ``(B, T)`` int64, restarting at 0 in each document.
        num_step_tokens: Scalar; targets of the whole optimizer step divided by its number of batches over all ranks.
            ``None`` normalises by this batch alone.
        one_document: Each row is one document, padded on the right. Attention then needs no mask; False is always right.
    """

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    num_step_tokens: Tensor | None = None
    one_document: bool = False


class AnswerBatch(Batch):
    """One prompt and its answer a row: the shape of supervised tuning, ranking tests and prediction.

    Attributes:
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        answer_ids: ``(B, K, A)`` int64, padded on the right, each answer ending in the end-of-sequence token.
            K is 1 here, and 0 answer tokens are allowed when nothing is to be learnt (prediction).
        answer_mask: ``(B, K, A)`` bool, True on real tokens.
        item_ids: ``(B, K)`` int64, the item that each answer names, -1 where it names none.
        history: ``(B, L)`` int64, items before the target that sequence models read, oldest first, padded with -1 on the left.
        seen: ``(B, S)`` int64, items not to be recommended again, padded with -1.
        candidates: ``(B, C)`` int64, the items to choose from; ``None`` means the whole catalogue.
        metric_history: ``(B, M)`` int64, items that metrics count as the history, padded like ``history``; ``None``: ``history``.
        num_step_tokens: As in :class:`PackedBatch`.
        answer_columns: Columns that the answers of a row need behind a shared prompt; ``None`` in batches not made by :func:`collate`, which
            then take ``K * (A - 1)``. A number, not a tensor: shapes must be known without asking the device.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    item_ids: Tensor
    history: Tensor
    seen: Tensor
    candidates: Tensor | None = None
    metric_history: Tensor | None = None
    num_step_tokens: Tensor | None = None
    answer_columns: int | None = None

    @property
    def target(self) -> Tensor:
        """The true next item, ``(B,)``."""
        return self.item_ids[:, 0]


class PreferenceBatch(AnswerBatch):
    """A prompt with a chosen answer (index 0) and K - 1 >= 1 rejected ones; a row with fewer has empty answers at the end.

    Attributes:
        reference_logps: ``(B, K)`` summed log-probabilities under the frozen reference, in nats; ``None`` when the module holds them.
        smoothing: ``(B,)`` float32, probability that a row is labelled the wrong way round; ``None`` takes that of the loss.
    """

    reference_logps: Tensor | None = None
    smoothing: Tensor | None = None


class QueryBatch(Batch):
    """Queries ``(h, r, ?)`` to a knowledge graph; ``(?, r, t)`` is asked as ``(t, r + R, ?)``. Prediction may ask ``(h, ?, t)``, too.

    Attributes:
        head: ``(B,)`` int64, entities.
        relation: ``(B,)`` int64, original relations 0..R-1, their reciprocals R..2R-1; -1 where it is asked.
        target: ``(P,)`` int64, true tails. One a query, unless training groups equal queries; none in prediction.
        target_row: ``(P,)`` int64, the row each belongs to, ascending.
        known: ``(F,)`` int64, all known answers of the queries, distinct in each: the filter; empty in training.
        known_row: ``(F,)`` int64, the row of each, ascending.
        num_step_tokens: As in :class:`PackedBatch`, where targets are the true tails.
        num_step_rows: Scalar; the same for rows: queries of the whole optimizer step divided by its number of batches over all ranks.
        tail: ``(B,)`` int64, entities of the queries that ask a relation, -1 in others; ``None`` where no query may ask one.
        one_each: Every query has exactly one true tail, in order: ``target_row`` is ``0..B-1``. Ranking is then faster; False is always right.
    """

    head: Tensor
    relation: Tensor
    target: Tensor
    target_row: Tensor
    known: Tensor
    known_row: Tensor
    num_step_tokens: Tensor | None = None
    num_step_rows: Tensor | None = None
    tail: Tensor | None = None
    one_each: bool = False


class Example(TypedDict):
    """One row before collation: the element type of every recommendation dataset.

    ``answers`` holds token lists, the chosen (true) one first, each ending in the end-of-sequence token. ``earlier`` holds all items of the user
    before the target, the ones that the prompt has no room for too: none of them serves as a negative. It is not collated. Where a row has no
    ``seen``, its ``history`` stands for it; the same holds for ``metric_history``.
    """

    sample_id: int
    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    item_ids: NotRequired[Sequence[int]]
    history: NotRequired[Sequence[int]]
    metric_history: NotRequired[Sequence[int]]
    earlier: NotRequired[Sequence[int]]
    seen: NotRequired[Sequence[int]]
    candidates: NotRequired[Sequence[int]]
    reference_logps: NotRequired[Sequence[float]]
    smoothing: NotRequired[float]


class PackedExample(TypedDict):
    """A row of whole documents laid end to end, as in :class:`PackedBatch`; ``document_ids`` run from 1."""

    sample_id: int
    input_ids: Sequence[int]
    document_ids: Sequence[int]


class Recommendations(NamedTuple):
    """The best items of each row, best first.

    Attributes:
        item_ids: ``(B, k)`` int64 of distinct items, -1 where fewer than k may be recommended.
        scores: ``(B, k)`` float32, descending, ``-inf`` beside -1.
    """

    item_ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a language model.

    Attributes:
        vocab_size: Number of tokens.
        eos_token_id: End-of-sequence token.
        pad_token_id: Padding token.
        tokenizer: Folder or id the tokenizer loads from.
        largest_token_id: Largest token that the data's texts have; ``None``: any of the vocabulary.
    """

    vocab_size: int
    eos_token_id: int = 0
    pad_token_id: int = 0
    tokenizer: str | None = None
    largest_token_id: int | None = None


@dataclass(frozen=True)
class Catalog:
    """The items that can be recommended, in id order.

    Attributes:
        titles: Distinct display titles.
        token_ids: Answer tokens of each title, the end-of-sequence token included; empty where no language model is used.
        genres: Genres of each item; empty tuples where unknown.
        popularity: Training interactions of each item.
        vocabulary: The tokenizer of ``token_ids``; ``None`` where no language model is used.
        keys: The source's own id of each item, the first one where several have the same title; empty where the source gives none.
        template: Fields of the prompt template; ``None`` where no language model is used.
    """

    titles: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...] = ()
    genres: tuple[tuple[str, ...], ...] = ()
    popularity: tuple[int, ...] = ()
    vocabulary: Vocabulary | None = None
    keys: tuple[str, ...] = ()
    template: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.titles)


@dataclass(frozen=True)
class KnowledgeGraph:
    """The vocabulary of a graph, in id order.

    Attributes:
        entities: Distinct labels.
        relations: Distinct labels of the R original relations; the reciprocal of ``r`` is ``r + R``.
        degree: Training triples that each entity occurs in.
        frequency: Training triples of each relation.
    """

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    degree: tuple[int, ...] = ()
    frequency: tuple[int, ...] = ()

    @property
    def num_entities(self) -> int:
        """Number of entities."""
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        """Number of relations with their reciprocals, 2R."""
        return 2 * len(self.relations)
