"""Collation of rows to batches; tensors are padded and masked here instead of in training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from malleable.datamodules.batch import (
    AnswerBatch,
    Batch,
    Example,
    PackedBatch,
    PackedExample,
    PreferenceBatch,
    SequenceBatch,
    SequenceExample,
)
from malleable.datamodules.padding import pad, pad_floats, padded_width

BatchT = TypeVar("BatchT", bound=Batch)


def collate(
    examples: Sequence[Example] | Sequence[PackedExample] | Sequence[SequenceExample],
    kind: type[BatchT] | None = None,
    *,
    pad_token_id: int = 0,
    pad_to_multiple_of: int = 8,
) -> BatchT:
    """Collate rows to a batch.

    Args:
        examples: Rows.
        kind: Type of the batch: :class:`AnswerBatch` (default), :class:`PreferenceBatch`, :class:`PackedBatch` or :class:`SequenceBatch`.
        pad_token_id: Padding token.
        pad_to_multiple_of: Round the widths of prompts, of packed rows and of answers without their last token, and ``answer_columns``, up to a
            multiple of this number. It does not affect results. GPU kernels are selected for each width, so that fewer distinct widths are faster.
            Attention kernels need masks aligned to 8; 32 gives fewer widths, but more padding.

    Raises:
        ValueError: If the rows do not fit the type of the batch, or if only some rows have a prompt.
    """
    name = AnswerBatch if kind is None else kind
    fields: Any = {
        AnswerBatch: ("prompt", collate_answers),
        PreferenceBatch: ("prompt", collate_preferences),
        PackedBatch: ("input_ids", collate_packed),
        SequenceBatch: ("items", _collate_sequences),
    }.get(name)
    if fields is None:
        raise ValueError(f"kind must be AnswerBatch, PreferenceBatch, PackedBatch or SequenceBatch, got {name.__name__}")
    field, make = fields
    if field not in examples[0]:
        raise ValueError(f"a row of {name.__name__} must have the field {field!r}, got {', '.join(examples[0])}; choose another kind")
    return cast("BatchT", make(examples, pad_token_id, pad_to_multiple_of))


def collate_packed(examples: Sequence[PackedExample], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> PackedBatch:
    """Collate rows to a :class:`PackedBatch`."""
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


def collate_sequences(examples: Sequence[SequenceExample], pad_to_multiple_of: int = 8) -> SequenceBatch:
    """Collate rows of items to a :class:`SequenceBatch`: training rows, which are padded on the right, or rows with a ``target``, padded on the left.

    Raises:
        ValueError: If only some rows have a target, if a training row is empty, or if an item is not a number >= 0.
    """
    queries = {"target" in example for example in examples}
    if len(queries) > 1:
        raise ValueError("either all rows of a SequenceBatch have the field 'target', or none; collate training rows and rows to rank separately")
    (is_query,) = queries
    rows: list[Any] = [np.asarray(example["items"]) if len(example["items"]) else np.zeros(0, np.int64) for example in examples]
    _check_items(examples, rows, is_query)
    lengths = np.array([len(items) for items in rows])
    width = padded_width(max(int(lengths.max()), 1), pad_to_multiple_of)
    side = "left" if is_query else "right"
    item_ids = pad(rows, -1, side, width)
    documents = None
    if is_query:
        targets = torch.full_like(item_ids, -1)
        targets[:, -1] = torch.tensor([example.get("target", -1) for example in examples])
        num_sequences, longest = len(rows), max(1, int(lengths.max()))
    else:
        numbers: list[Any] = [
            np.asarray(example.get("document_ids", np.ones(len(items))), dtype=np.int64) for example, items in zip(examples, rows, strict=True)
        ]
        targets = pad([_next_items(*row) for row in zip(examples, rows, numbers, strict=True)], -1, side, width)
        documents = pad(numbers, 0, side, width) if any("document_ids" in example for example in examples) else None
        sizes = np.concatenate([np.unique(own, return_counts=True)[1] for own in numbers])
        num_sequences, longest = len(sizes), int(sizes.max())
    return SequenceBatch(
        sample_id=torch.tensor([example["sample_id"] for example in examples]),
        item_ids=item_ids,
        targets=targets,
        document_ids=documents,
        supervised=(targets.flatten() >= 0).nonzero().flatten(),
        seen=pad([example.get("seen", example["items"]) for example in examples], -1) if is_query else torch.zeros(len(rows), 0, dtype=torch.long),
        candidates=pad([example.get("candidates", ()) for example in examples], -1)
        if any(len(example.get("candidates", ())) for example in examples)
        else None,
        metric_history=pad([example.get("metric_history", example["items"]) for example in examples], -1, "left")
        if any("metric_history" in example for example in examples)
        else None,
        times=pad_floats([example["times"] for example in examples], side, width) if all("times" in example for example in examples) else None,
        behaviors=pad([example["behaviors"] for example in examples], -1, side, width)
        if all("behaviors" in example for example in examples)
        else None,
        num_sequences=num_sequences,
        longest=longest,
        is_query=is_query,
    )


def _collate_sequences(examples: Sequence[SequenceExample], pad_token_id: int, pad_to_multiple_of: int) -> SequenceBatch:
    return collate_sequences(examples, pad_to_multiple_of)


def _check_items(examples: Sequence[SequenceExample], rows: Sequence[Any], is_query: bool) -> None:
    for example, items in zip(examples, rows, strict=True):
        if items.ndim != 1 or items.dtype.kind not in "iu" or items.min(initial=0) < 0 or not (is_query or len(items)):
            empty = "" if is_query else ", not empty"
            raise ValueError(
                f"the field 'items' of the row with sample_id {example['sample_id']} must be a list of item numbers >= 0{empty}; "
                f"got {list(example['items'])[:5]}{' ...' if len(items) > 5 else ''}"
            )
        for name in ("document_ids", "supervised", "times", "behaviors"):
            if name in example and len(example[name]) != len(items):
                raise ValueError(
                    f"the field {name!r} of the row with sample_id {example['sample_id']} has {len(example[name])} values for {len(items)} items; "
                    "give one for each item"
                )
        document = np.asarray(example.get("document_ids", ()))
        starts = document[np.flatnonzero(np.diff(document, prepend=0))]
        if len(document) and (document.min() < 1 or len(np.unique(starts)) < len(starts)):
            raise ValueError(
                f"the field 'document_ids' of the row with sample_id {example['sample_id']} must have numbers >= 1, with the items of a sequence "
                f"next to each other; got {document[:10].tolist()}{' ...' if len(document) > 10 else ''}"
            )


def _next_items(example: SequenceExample, items: Any, document: Any) -> Any:
    """Return the item after each position within its sequence, -1 if there is none or if it does not contribute to the loss."""
    following = np.full(len(items), -1)
    same = document[1:] == document[:-1]
    if "supervised" in example:
        same &= np.asarray(example["supervised"], dtype=bool)[1:]
    following[:-1][same] = items[1:][same]
    return following


def collate_answers(examples: Sequence[Example], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> AnswerBatch:
    """Collate rows to an :class:`AnswerBatch`.

    Raises:
        ValueError: If a row has several answers.
    """
    if several := next((example for example in examples if len(example["answers"]) != 1), None):
        raise ValueError(
            f"a row of AnswerBatch must have one answer, but the row with sample_id {several['sample_id']} has {len(several['answers'])}; "
            "collate rows with rejected answers to a PreferenceBatch"
        )
    return AnswerBatch(**_columns(examples, 1, pad_token_id, pad_to_multiple_of))


def collate_preferences(examples: Sequence[Example], pad_token_id: int = 0, pad_to_multiple_of: int = 8) -> PreferenceBatch:
    """Collate rows to a :class:`PreferenceBatch`; rows may have different numbers of rejected answers.

    Raises:
        ValueError: If a row has no rejected answer.
    """
    if single := next((example for example in examples if len(example["answers"]) < 2), None):
        raise ValueError(
            f"a row of PreferenceBatch must have a chosen answer and at least one rejected answer, but the row with sample_id {single['sample_id']} "
            f"has {len(single['answers'])} answers; collate rows without rejected answers to an AnswerBatch"
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
    unpaired = sum("desirable" in example for example in examples)
    if unpaired not in (0, len(examples)):
        raise ValueError(f"{unpaired} of {len(examples)} rows have the field 'desirable'; train on pairs and on unpaired rows separately")
    if unpaired:
        columns["desirable"] = torch.tensor([example["desirable"] for example in examples])
    return PreferenceBatch(**columns)


def _columns(examples: Sequence[Example], count: int, pad_token_id: int, pad_to_multiple_of: int) -> dict[str, Any]:
    """Return the fields of a batch with ``count`` answers in each row; missing answers are empty."""
    prompts = [example["prompt"] for example in examples]
    answers = [answer for example in examples for answer in [*example["answers"], *[()] * count][:count]]
    lengths = torch.tensor([len(answer) for answer in answers]).reshape(len(examples), count)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    _check_prompts(prompt_lengths, lengths, examples)
    longest = int(lengths.max())
    # The last token of an answer is not an input. Without it, the width is a multiple of `pad_to_multiple_of`.
    answer_ids = pad(answers, pad_token_id, width=padded_width(longest - 1, pad_to_multiple_of) + 1 if longest else 0)
    answer_ids = answer_ids.reshape(len(examples), count, -1)
    prompt_ids = pad(prompts, pad_token_id, "left", padded_width(int(prompt_lengths.max()), pad_to_multiple_of))
    items = [example.get("item_ids", ()) for example in examples]
    candidates = [example.get("candidates", ()) for example in examples]
    counted = [example.get("metric_history", example.get("history", ())) for example in examples]
    return dict(
        sample_id=torch.tensor([example["sample_id"] for example in examples]),
        prompt_ids=prompt_ids,
        prompt_mask=torch.arange(prompt_ids.shape[1]) >= prompt_ids.shape[1] - prompt_lengths[:, None],
        answer_ids=answer_ids,
        answer_mask=torch.arange(answer_ids.shape[2]) < lengths[..., None],
        item_ids=pad(items, -1, width=count),
        history=pad([example.get("history", ()) for example in examples], -1, "left"),
        # Without the field `seen`, no item of the history is recommended again; with an empty list, all items may be recommended again.
        seen=pad([example.get("seen", example.get("history", ())) for example in examples], -1),
        candidates=pad(candidates, -1) if any(len(row) for row in candidates) else None,
        metric_history=pad(counted, -1, "left") if any("metric_history" in example for example in examples) else None,
        answer_columns=padded_width(int((lengths - 1).clamp_min(0).sum(1).max()), pad_to_multiple_of),
    )


def _check_prompts(prompt_lengths: Tensor, answer_lengths: Tensor, examples: Sequence[Example]) -> None:
    """Raise an error if a prompt is empty, because nothing would predict the first token of the answer. Batches without any tokens are allowed.

    Raises:
        ValueError: If a prompt is empty.
    """
    empty = prompt_lengths == 0
    if bool(empty.any()) and bool(prompt_lengths.any() | answer_lengths.any()):
        sample_id = examples[int(empty.long().argmax())]["sample_id"]
        raise ValueError(
            f"every row needs at least one prompt token, got an empty prompt in the row with sample_id {sample_id}; "
            "give the template a prefix or a beginning-of-sequence token"
        )
