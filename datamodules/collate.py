"""Collation of rows to batches; tensors are padded and masked here instead of in training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from malleable.datamodules.batch import AnswerBatch, Batch, Example, PackedBatch, PackedExample, PreferenceBatch
from malleable.datamodules.padding import pad, padded_width

BatchT = TypeVar("BatchT", bound=Batch)


def collate(
    examples: Sequence[Example] | Sequence[PackedExample], kind: type[BatchT] | None = None, *, pad_token_id: int = 0, pad_to_multiple_of: int = 8
) -> BatchT:
    """Collate rows to a batch.

    Args:
        examples: Rows.
        kind: Type of the batch: :class:`AnswerBatch` (default), :class:`PreferenceBatch` or :class:`PackedBatch`.
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
    }.get(name)
    if fields is None:
        raise ValueError(f"kind must be AnswerBatch, PreferenceBatch or PackedBatch, got {name.__name__}")
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
