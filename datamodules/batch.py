"""Typed batches and the catalogue: the one vocabulary that data and modules share.

Shapes: B rows, P prompt tokens, K answers per row, A answer tokens, T tokens, L history items, S seen items, C candidates.
Of queries to a graph: P true tails, F known answers, R original relations. Item ids run from 0; -1 pads item lists.
A negative ``sample_id`` marks a row repeated only to fill a batch: metrics skip it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, Self, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from malleable.datamodules.padding import pad, padded_width
from malleable.datamodules.record import Record

ASKED = "?"
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


BatchT = TypeVar("BatchT", bound=Batch)


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
        history: ``(B, L)`` int64, items the prompt shows, oldest first, padded with -1 on the left.
        seen: ``(B, S)`` int64, items not to be recommended again, padded with -1.
        candidates: ``(B, C)`` int64, the items to choose from; ``None`` means the whole catalogue.
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
    ``seen``, its ``history`` stands for it.
    """

    sample_id: int
    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    item_ids: NotRequired[Sequence[int]]
    history: NotRequired[Sequence[int]]
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


def collate(
    examples: Sequence[Example] | Sequence[PackedExample], kind: type[BatchT] | None = None, *, pad_token_id: int = 0, pad_to_multiple_of: int = 8
) -> BatchT:
    """Make a batch of rows.

    Args:
        examples: Rows.
        kind: The batch to make: :class:`AnswerBatch` (default), :class:`PreferenceBatch` or :class:`PackedBatch`.
        pad_token_id: Padding token.
        pad_to_multiple_of: Rows of tokens are padded to a multiple of this many, and so are the columns of answers behind a shared prompt.
            Results do not depend on it. On a GPU kernels are chosen, and sometimes planned, for each width: few widths are faster. 8 also is
            what attention kernels want masks aligned to; 32 means fewer widths and more padding.

    Raises:
        ValueError: If the rows are of another kind, or if only some rows have a prompt.
    """
    name = AnswerBatch if kind is None else kind
    fields: Any = {
        AnswerBatch: ("prompt", collate_answers),
        PreferenceBatch: ("prompt", collate_preferences),
        PackedBatch: ("input_ids", collate_packed),
    }.get(name)
    if fields is None:
        raise ValueError(f"collate makes AnswerBatch, PreferenceBatch or PackedBatch, not {name.__name__}")
    field, make = fields
    if field not in examples[0]:
        raise ValueError(f"a row of {name.__name__} has the field {field!r}, this one has {', '.join(examples[0])}; choose another kind")
    return cast("BatchT", make(examples, pad_token_id, pad_to_multiple_of))


def collate_packed(examples: Sequence[PackedExample], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> PackedBatch:
    """Make a :class:`PackedBatch`; positions restart with each document."""
    width = padded_width(max(len(example["input_ids"]) for example in examples), pad_to_multiple_of)
    document_ids = pad([example["document_ids"] for example in examples], 0, width=width)
    column = torch.arange(document_ids.shape[1])
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return PackedBatch(
        sample_id=torch.tensor([example["sample_id"] for example in examples]),
        input_ids=pad([example["input_ids"] for example in examples], pad_token_id, width=width),
        document_ids=document_ids,
        position_ids=column - (starts * column).cummax(1).values,
        one_document=all(min(example["document_ids"]) == max(example["document_ids"]) > 0 for example in examples),
    )


def collate_answers(examples: Sequence[Example], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> AnswerBatch:
    """Make an :class:`AnswerBatch`.

    Raises:
        ValueError: If a row has several answers.
    """
    if several := next((example for example in examples if len(example["answers"]) != 1), None):
        raise ValueError(
            f"a row of AnswerBatch has one answer, the row with sample_id {several['sample_id']} has {len(several['answers'])}; collate rows with "
            "rejected answers as PreferenceBatch"
        )
    return AnswerBatch(**_columns(examples, 1, pad_token_id, pad_to_multiple_of))


def collate_preferences(examples: Sequence[Example], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> PreferenceBatch:
    """Make a :class:`PreferenceBatch`; rows may have different numbers of rejected answers.

    Raises:
        ValueError: If a row has no rejected answer.
    """
    if single := next((example for example in examples if len(example["answers"]) < 2), None):
        raise ValueError(
            f"a row of PreferenceBatch has a chosen and at least one rejected answer, the row with sample_id {single['sample_id']} has "
            f"{len(single['answers'])} in all; collate rows without rejected answers as AnswerBatch"
        )
    count = max(len(example["answers"]) for example in examples)
    columns = _columns(examples, count, pad_token_id, pad_to_multiple_of)
    reference = [example.get("reference_logps") for example in examples]
    if all(row is not None for row in reference):
        rows = [[*row, *[0.0] * count][:count] for row in cast("list[Sequence[float]]", reference)]
        columns["reference_logps"] = torch.tensor(rows, dtype=torch.float32)
    smoothing = [example.get("smoothing") for example in examples]
    if all(value is not None for value in smoothing):
        columns["smoothing"] = torch.tensor(smoothing, dtype=torch.float32)
    return PreferenceBatch(**columns)


def _columns(examples: Sequence[Example], count: int, pad_token_id: int, pad_to_multiple_of: int) -> dict[str, Any]:
    """Make the fields of a batch with ``count`` answers a row; missing answers are empty."""
    prompts = [example["prompt"] for example in examples]
    answers = [answer for example in examples for answer in [*example["answers"], *[()] * count][:count]]
    lengths = torch.tensor([len(answer) for answer in answers]).reshape(len(examples), count)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    _check_prompts(prompt_lengths, lengths, examples)
    longest = int(lengths.max())
    # The last token of an answer is not fed, so this width makes whole multiples behind a prompt, too.
    answer_ids = pad(answers, pad_token_id, width=padded_width(longest - 1, pad_to_multiple_of) + 1 if longest else 0)
    answer_ids = answer_ids.reshape(len(examples), count, -1)
    prompt_ids = pad(prompts, pad_token_id, "left", padded_width(int(prompt_lengths.max()), pad_to_multiple_of))
    items = [example.get("item_ids", ()) for example in examples]
    candidates = [example.get("candidates", ()) for example in examples]
    return dict(
        sample_id=torch.tensor([example["sample_id"] for example in examples]),
        prompt_ids=prompt_ids,
        prompt_mask=torch.arange(prompt_ids.shape[1]) >= prompt_ids.shape[1] - prompt_lengths[:, None],
        answer_ids=answer_ids,
        answer_mask=torch.arange(answer_ids.shape[2]) < lengths[..., None],
        item_ids=pad(items, -1, width=count),
        history=pad([example.get("history", ()) for example in examples], -1, "left"),
        # Rows of others need not list what was seen; an empty list says that everything may be recommended again.
        seen=pad([example.get("seen", example.get("history", ())) for example in examples], -1),
        candidates=pad(candidates, -1) if any(len(row) for row in candidates) else None,
        answer_columns=padded_width(int((lengths - 1).clamp_min(0).sum(1).max()), pad_to_multiple_of),
    )


def _check_prompts(prompt_lengths: Tensor, answer_lengths: Tensor, examples: Sequence[Example]) -> None:
    """Refuse answers without a prompt: nothing would predict their first token. Rows of items alone have neither."""
    empty = prompt_lengths == 0
    if bool(empty.any()) and bool(prompt_lengths.any() | answer_lengths.any()):
        sample_id = examples[int(empty.long().argmax())]["sample_id"]
        raise ValueError(
            f"every row needs at least one prompt token, got an empty prompt in the row with sample_id {sample_id}; "
            "give the template a prefix or a beginning-of-sequence token"
        )
