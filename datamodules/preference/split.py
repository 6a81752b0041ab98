"""Split of preference data by prompt, and answers of other rows for unpaired rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from malleable.datamodules.sample_ids import Hashes, Ints, keyed_hashes, keyed_order, keyed_uniforms

SPLITS = ("train", "val", "test")
# Purposes of pseudo-random numbers.
_SPLIT, _PARTNER = 1, 2


@dataclass(frozen=True)
class PreferenceSplit:
    """Split by prompt, and limits of the numbers of rows.

    All rows of a prompt belong to one split, which depends on the prompt and the seed only. A split that the source gives has precedence.

    Attributes:
        val_size: Validation prompts: a share in (0, 1), or their number. ``None``: no validation rows.
        test_size: Test prompts: a share in (0, 1), or their number. ``None``: no test rows.
        train_limit: Maximum number of training rows, sampled by their ids; default: all.
        val_limit: Maximum number of validation rows; default: all.
        test_limit: Maximum number of test rows; default: all.

    Raises:
        ValueError: If a value is out of range.
    """

    val_size: int | float | None = 0.05
    test_size: int | float | None = 0.05
    train_limit: int | None = None
    val_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("val_size", "test_size"):
            size = getattr(self, name)
            if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
                raise ValueError(f"{name} must be a share in (0, 1), a number of prompts >= 1, or null, got {size}")
        for name in ("train_limit", "val_limit", "test_limit"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be >= 1, got {limit}")

    def sizes(self, given: set[str]) -> tuple[int | float | None, int | float | None]:
        """Return sizes of the validation and test prompts that are taken from the training rows, if the source gives the splits ``given``."""
        return None if "val" in given else self.val_size, None if "test" in given else self.test_size


def split_by_prompt(prompts: Hashes, sizes: tuple[int | float | None, int | float | None], seed: int) -> dict[str, Ints]:
    """Return the positions of the rows of each split.

    Args:
        prompts: ``(N,)`` hash of the prompt of each row.
        sizes: Share or number of the validation prompts, and of the test prompts; ``None``: no such split. A split has at least one prompt.
        seed: Seed of the split.

    Raises:
        ValueError: If no training prompt remains.
    """
    distinct, prompt = np.unique(prompts, return_inverse=True)
    order = keyed_order(distinct, seed, _SPLIT)
    chances = keyed_uniforms(distinct, seed, _SPLIT)
    # Validation prompts have the smallest numbers, test prompts the largest ones, so that each size can change independently.
    counts = [
        0 if size is None else max(1, int((values < size).sum())) if size < 1 else int(size)
        for size, values in zip(sizes, (chances, 1 - chances), strict=True)
    ]
    if sum(counts) >= len(distinct):
        raise ValueError(
            f"{counts[0]} validation and {counts[1]} test prompts leave no training prompt: the source has {len(distinct)} distinct prompts; "
            "reduce val_size and test_size, set them to null, or give files of these splits"
        )
    kind = np.zeros(len(distinct), dtype=np.int64)
    kind[order[: counts[0]]] = 1
    kind[order[len(order) - counts[1] :]] = 2
    names = ["train", *(name for name, size in zip(SPLITS[1:], sizes, strict=True) if size is not None)]
    return {name: np.flatnonzero(kind[prompt] == SPLITS.index(name)) for name in names}


def other_rows(prompts: Hashes, ids: Ints, seed: int) -> Ints:
    """Return for each row the position of a row with another prompt, if there is one, else of another row.

    Rows are ordered by a pseudo-random number of their id, in a circle, and the result is the next row with another prompt. Almost every row is
    therefore the other row of exactly one row, and a missing row changes only the results of the rows before it.

    Args:
        prompts: ``(N,)`` hash of the prompt of each row.
        ids: ``(N,)`` ids of the rows.
        seed: Seed of the order.
    """
    count = len(ids)
    order = np.argsort(keyed_hashes(ids, seed, _PARTNER), kind="stable")
    circle = np.concatenate([prompts[order]] * 2)
    changes = np.flatnonzero(circle[1:] != circle[:-1]) + 1
    place = np.arange(count)
    following: Any = changes[np.searchsorted(changes, place, side="right")] if len(changes) else place + 1
    result = np.empty(count, dtype=np.int64)
    result[order] = order[following % count]
    return result
