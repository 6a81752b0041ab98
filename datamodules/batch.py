"""Typed batches, catalogue, vocabulary and graph labels, which data modules and modules share.

Shapes: B rows, P prompt tokens, K answers per row, A answer tokens, T tokens, L history items, M history items for metrics, S seen items,
C candidates.
Queries to a graph: P true tails, F known answers, R original relations. Item ids run from 0; -1 pads item lists.
A negative ``sample_id`` marks a padding row (a row that is repeated only to fill a batch), which losses and metrics ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Protocol, Self, TypedDict, runtime_checkable

import torch
from torch import Tensor

from malleable.datamodules.record import Record

WILDCARD = "?"
"""Label of the unknown part of a query in files."""


class Batch(Record):
    """Base class of batches; rows have a stable identity.

    A subclass declares fields by annotations, without ``@dataclass``. Float fields keep their dtype in every precision of the Trainer. A module that
    multiplies a field with weights must convert it: ``batch.features.to(self.dtype)``.

    Attributes:
        sample_id: ``(B,)`` int64; a row has the same id in every run; negative for padding rows.
    """

    sample_id: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sample_id)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with ``function`` applied to every tensor, including tensors of nested batches."""
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
            device: Target device.
            non_blocking: Copy asynchronously. Default: true, except for copies to the CPU and to MPS, as in Lightning.
        """
        if non_blocking is None:
            non_blocking = torch.device(device).type not in ("cpu", "mps")
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory."""
        return self.map(lambda tensor: tensor.pin_memory())


@runtime_checkable
class RankedRows(Protocol):
    """Fields of batches whose rows have a history and a true next item: :class:`AnswerBatch` and :class:`SequenceBatch`.

    Counting baselines, metrics of recommended lists and reports need these fields only.

    Attributes:
        sample_id: ``(B,)`` int64; negative for padding rows.
        history: ``(B, L)`` int64, items before the target, oldest first, padded with -1 on the left.
        seen: ``(B, S)`` int64, items that are not recommended, padded with -1.
        candidates: ``(B, C)`` int64, items to choose from, padded with -1; ``None`` means the whole catalogue.
        metric_history: ``(B, M)`` int64, items that metrics count as the user's history, padded like ``history``; ``None``: ``history``.
        target: ``(B,)`` int64, true next item, -1 if there is none.
    """

    sample_id: Tensor
    seen: Tensor
    candidates: Tensor | None
    metric_history: Tensor | None

    @property
    def history(self) -> Tensor:
        """Items before the target, ``(B, L)``."""

    @property
    def target(self) -> Tensor:
        """True next item, ``(B,)``."""

    def __len__(self) -> int:
        """Return the number of rows."""


class PackedBatch(Batch):
    """Documents packed into rows; all tokens except the first of each document are targets.

    Attributes:
        input_ids: ``(B, T)`` int64.
        document_ids: ``(B, T)`` int64; 0 is padding, tokens with equal numbers belong to one document.
        position_ids: ``(B, T)`` int64, starting at 0 in each document.
        num_step_tokens: Scalar; mean number of targets of a batch, over all batches of the optimizer step on all ranks. Losses are divided by it.
            ``None``: losses are divided by the number of targets of this batch.
        one_document: Whether each row is one document, padded on the right, so that attention needs no mask. False is always correct.
    """

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    num_step_tokens: Tensor | None = None
    one_document: bool = False


class AnswerBatch(Batch):
    """Prompts with one answer each, for supervised fine-tuning, ranking and prediction.

    Attributes:
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        answer_ids: ``(B, K, A)`` int64, padded on the right. Answers end with the end-of-sequence token. K is 1; A may be 0 in prediction.
        answer_mask: ``(B, K, A)`` bool, True on real tokens.
        item_ids: ``(B, K)`` int64, the item of each answer, -1 if it is not an item.
        history: ``(B, L)`` int64, items before the target that sequence models read, oldest first, padded with -1 on the left.
        seen: ``(B, S)`` int64, items that are not recommended, usually those that the user has seen; padded with -1.
        candidates: ``(B, C)`` int64, items to choose from, padded with -1; ``None`` means the whole catalogue.
        metric_history: ``(B, M)`` int64, items that metrics count as the user's history, padded like ``history``; ``None``: ``history``.
        num_step_tokens: As in :class:`PackedBatch`.
        answer_columns: Number of columns for the answers of a row, if they are concatenated after one copy of the prompt, without the last token of
            each answer. ``None``: ``K * (A - 1)``. It is an ``int``, not a tensor, so that shapes are known without synchronisation.
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
        """True next item, ``(B,)``."""
        return self.item_ids[:, 0]


class PreferenceBatch(AnswerBatch):
    """Prompts with a chosen answer (index 0) and K - 1 >= 1 rejected answers; rows with fewer answers are padded with empty ones.

    Attributes:
        reference_logps: ``(B, K)`` summed log-probabilities under the frozen reference, in nats; ``None`` without a reference.
        smoothing: ``(B,)`` float32, probability that the preference of a row is reversed; ``None``: the smoothing of the loss.
        desirable: ``(B,)`` bool, for unpaired rows: whether answer 0 is desirable. Answer 1 is then the answer of another row, with which losses
            such as ``KTO`` estimate the divergence from the reference. ``None``: answer 0 is preferred to the others.
        num_step_rows: Scalar; mean number of rows of a batch, over all batches of the optimizer step on all ranks. Losses are divided by it.
            ``None``: by the number of rows of this batch.
    """

    reference_logps: Tensor | None = None
    smoothing: Tensor | None = None
    desirable: Tensor | None = None
    num_step_rows: Tensor | None = None


class SequenceBatch(Batch):
    """Sequences of items with the next item of each position, for sequence models.

    A training row is a part of a user's history, or several of them if rows are packed. A row to rank items for (``is_query``) is one sequence,
    padded on the left, whose only target is the one of the last position.

    Attributes:
        item_ids: ``(B, T)`` int64, oldest first; -1 is padding.
        targets: ``(B, T)`` int64, the item after each position; -1 if there is none or if it does not contribute to the loss.
        document_ids: ``(B, T)`` int64; 0 is padding, positions with equal numbers belong to one sequence. ``None``: each row is one sequence.
        supervised: ``(P,)`` int64, positions with a target, as indices of the flattened targets, so that losses need no synchronisation; ``None``:
            all positions.
        seen: ``(B, S)`` int64, items that are not recommended, padded with -1.
        candidates: As in :class:`AnswerBatch`.
        metric_history: As in :class:`AnswerBatch`.
        times: ``(B, T)`` float64, time of each item in the unit of the data, usually seconds; 0 at padding. ``None``: unknown.
        behaviors: ``(B, T)`` int64, type of each interaction, e.g. view or purchase; -1 at padding. ``None``: unknown.
        num_step_tokens: As in :class:`PackedBatch`.
        num_sequences: Number of sequences of all rows.
        longest: Number of items of the longest sequence.
        is_query: Whether each row is one sequence to rank items for.
    """

    item_ids: Tensor
    targets: Tensor
    document_ids: Tensor | None
    supervised: Tensor | None
    seen: Tensor
    candidates: Tensor | None = None
    metric_history: Tensor | None = None
    times: Tensor | None = None
    behaviors: Tensor | None = None
    num_step_tokens: Tensor | None = None
    num_sequences: int | None = None
    longest: int | None = None
    is_query: bool = False

    @property
    def history(self) -> Tensor:
        """Items of each row, ``(B, T)``."""
        return self.item_ids

    @property
    def target(self) -> Tensor:
        """Target of the last position, ``(B,)``."""
        return self.targets[:, -1] if self.targets.shape[1] else self.targets.new_full((len(self),), -1)


class QueryBatch(Batch):
    """Queries ``(h, r, ?)`` to a knowledge graph; ``(?, r, t)`` is converted to ``(t, r + R, ?)``. Prediction also supports ``(h, ?, t)``.

    Attributes:
        head: ``(B,)`` int64, entities.
        relation: ``(B,)`` int64, original relations 0..R-1 or reciprocals R..2R-1; -1 for queries ``(h, ?, t)``.
        target: ``(P,)`` int64, true tails: one for each query, several if training groups equal queries, none in prediction.
        target_row: ``(P,)`` int64, the row of each true tail, ascending.
        known: ``(F,)`` int64, known answers of the queries in all splits (entities, or relations for queries ``(h, ?, t)``), distinct within each
            query; empty in training.
        known_row: ``(F,)`` int64, the row of each known answer, ascending.
        num_step_tokens: As in :class:`PackedBatch`; targets are the true tails.
        num_step_rows: Scalar; mean number of queries of a batch, over all batches of the optimizer step on all ranks.
        tail: ``(B,)`` int64, tails of queries ``(h, ?, t)``, -1 for other queries; ``None`` if there are no queries ``(h, ?, t)``.
        one_each: Whether each query has exactly one true tail, in order, so that ``target_row`` is ``0..B-1``. Ranking is then faster; False is
            always correct.
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
    """Row of a recommendation dataset, before collation.

    ``answers`` contains the tokens of each answer, the chosen (true) one first, with the end-of-sequence token. ``earlier`` contains all items of the
    user before the target, including those that do not fit into the prompt; they are never negatives, and they are not collated. If a row has no
    ``seen`` or no ``metric_history``, its ``history`` is used instead.
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
    desirable: NotRequired[bool]


class PackedExample(TypedDict):
    """Row of concatenated documents, as in :class:`PackedBatch`; ``document_ids`` start at 1."""

    sample_id: int
    input_ids: Sequence[int]
    document_ids: Sequence[int]


class SequenceExample(TypedDict):
    """Row of items, before collation to a :class:`SequenceBatch`.

    Attributes:
        items: Items, oldest first; of several sequences one after another if there are ``document_ids``.
        target: True next item after the last one; the row then has this target only. Without it, each item is the target of the item before it.
        supervised: For each item, whether it contributes to the loss as a target; default: all.
        document_ids: Number of the sequence of each item, from 1.
        times: Time of each item.
        behaviors: Type of each interaction.
        seen: Items that are not recommended; default: ``items``.
    """

    sample_id: int
    items: Sequence[int]
    target: NotRequired[int]
    supervised: NotRequired[Sequence[bool]]
    document_ids: NotRequired[Sequence[int]]
    times: NotRequired[Sequence[float]]
    behaviors: NotRequired[Sequence[int]]
    seen: NotRequired[Sequence[int]]
    candidates: NotRequired[Sequence[int]]
    metric_history: NotRequired[Sequence[int]]


class Recommendations(NamedTuple):
    """Best items of each row, best first.

    Attributes:
        item_ids: ``(B, k)`` int64, distinct items, padded with -1 if fewer than k are allowed.
        scores: ``(B, k)`` float32, descending, ``-inf`` for padding.
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
        tokenizer: Folder or hub id of the tokenizer; ``None`` if there is none.
        largest_token_id: Largest token id in the texts of the data; ``None`` if unknown.
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
        titles: Distinct titles.
        token_ids: Answer tokens of each title, including the end-of-sequence token; empty without a language model.
        genres: Genres of each item; empty tuples if unknown.
        popularity: Number of training interactions of each item.
        vocabulary: Vocabulary of ``token_ids``; ``None`` without a language model.
        keys: Id of each item in the source, the first one if several items have the same title; empty if the source has no ids.
        template: Fields of the prompt template; ``None`` without a language model.
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
    """Labels of the entities and relations of a graph, by id.

    Attributes:
        entities: Distinct labels of entities.
        relations: Distinct labels of the R original relations; the reciprocal of ``r`` is ``r + R``.
        degree: Number of training triples of each entity.
        frequency: Number of training triples of each relation.
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
