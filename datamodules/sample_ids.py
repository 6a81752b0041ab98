"""Sample ids that depend on the content of rows, and orders that depend on ids.

The id of a row does not change if other rows are removed or added. The same holds for values that are computed from the id: the negatives and the
candidates of the row, and its order relative to another row. Ids are 63-bit hashes, so that negative values can mark padding rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import read_lines

Ints = NDArray[np.integer[Any]]
Hashes = NDArray[np.uint64]


def text_hashes(texts: Iterable[str]) -> Hashes:
    """Return the hash of each text, ``(N,)``."""
    return np.array([_digest(text.encode()) for text in texts], dtype=np.uint64)


def array_hash(values: NDArray[Any]) -> int:
    """Return the hash of an array's content."""
    return _digest(np.ascontiguousarray(values).tobytes())


def content_ids(*columns: NDArray[Any]) -> Ints:
    """Return an id for each row, ``(N,)`` int64, >= 0.

    If several rows have equal content, the ids of all of them except the first one also depend on the position among these rows.

    Args:
        columns: ``(N,)`` hashes, integers or float64 numbers; together they are the content of a row.
    """
    ids = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        ids = mix(ids ^ mix(column.view(np.uint64) if column.dtype.itemsize == 8 else column.astype(np.int64).view(np.uint64)))
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ids) else np.zeros(0, dtype=np.int64)
    number = np.arange(len(ids)) - np.repeat(first, np.diff(np.r_[first, len(ids)]))
    repeated = order[number > 0]
    ids[repeated] = mix(ids[repeated] + number[number > 0].astype(np.uint64))
    return (ids >> np.uint64(1)).view(np.int64)


def keyed_hashes(ids: Ints | Hashes, *key: int) -> Hashes:
    """Return pseudo-random 64-bit numbers ``(N,)`` that depend on the ids and a key.

    Args:
        ids: ``(N,)`` int64 or uint64 ids.
        key: Key, e.g. seed and epoch; each key gives other numbers.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix(state ^ np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return mix(ids.view(np.uint64) ^ state)


def keyed_order(ids: Ints | Hashes, *key: int) -> Ints:
    """Return a permutation ``(N,)`` that depends on the ids and a key, as in :func:`keyed_hashes`."""
    return np.argsort(keyed_hashes(ids, *key), kind="stable")


def keyed_uniforms(ids: Ints | Hashes, *key: int) -> NDArray[np.float64]:
    """Return pseudo-random numbers ``(N,)`` in [0, 1) that depend on the ids and a key, as in :func:`keyed_hashes`."""
    return (keyed_hashes(ids, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(values: Hashes) -> Hashes:
    """Apply a mixing function to 64-bit numbers.

    Source:
        Steele, Lea, Flood (2014), Fast Splittable Pseudorandom Number Generators: the mixing function of SplitMix64.
    """
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read_sample_ids(path: Path, known: Ints) -> Ints:
    """Read ids of rows from a text file with one id on each line.

    Args:
        path: The file.
        known: ``(N,)`` ids of the training rows that exist.

    Returns:
        ``(M,)`` int64 ids, in the order of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is not the id of a training row. The message contains the line number.
    """
    ids = []
    rows = set(known.tolist())
    for number, line in read_lines(path):
        text = line.strip()
        if not text.isascii() or not text.isdigit() or int(text) not in rows:
            raise ValueError(f"{path}, line {number}: {brief_repr(text)} is not the sample_id of a training row; write one such id on each line")
        ids.append(int(text))
    return np.array(ids, dtype=np.int64)
