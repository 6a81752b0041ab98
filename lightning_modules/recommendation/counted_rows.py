"""Rows that counting baselines read.

Shapes: B rows, S seen items.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from malleable.datamodules.batch import Example, RankedRows


def training_rows(source: Any) -> Any:
    """Return the training rows of a data module that have a history and a target: its ``answer_dataset``, or its ``train_dataset``.

    Raises:
        MisconfigurationException: If it has none.
    """
    rows = answer_rows(source)
    if rows is None:
        raise MisconfigurationException(
            f"{type(source).__name__} has no training rows with a history and a target, neither in `train_dataset` nor in `answer_dataset`; "
            "use a data module of recommendation, such as RecommendationDataModule"
        )
    return rows


def answer_rows(source: Any) -> Any:
    """Return the training rows, see :func:`training_rows`; ``None`` if there are none."""
    rows = getattr(source, "answer_dataset", None) or getattr(source, "train_dataset", None)
    return rows if rows and "answers" in rows[0] else None


def counted_columns(batch: RankedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of a batch that baselines count: target, seen items and last item. Without seen items, the history is used instead.

    Args:
        batch: B rows; padding rows have a negative ``sample_id``.

    Returns:
        ``(B,)`` target, -1 in padding rows; ``(B, S)`` seen items; ``(B,)`` last item before the target, -1 if there is none.
    """
    target = batch.target.masked_fill(batch.sample_id < 0, -1)
    seen = batch.seen if batch.seen.shape[1] else batch.history
    last = batch.history[:, -1] if batch.history.shape[1] else torch.full_like(target, -1)
    return target, seen, last


def items_only(row: Example) -> Example:
    """Return a row without text, which baselines do not read, and without rejected answers."""
    return {
        "sample_id": row["sample_id"],
        "prompt": (),
        "answers": [()],
        "item_ids": list(row.get("item_ids", (-1,)))[:1],
        "history": row.get("history", ()),
        "seen": row.get("seen", row.get("history", ())),
    }
