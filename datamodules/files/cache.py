"""Cache folders of memory-mapped tables or arrays, which are written once, verified when opened, and shared by all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.sealed import MANIFEST, find_damage, is_intact, seal

log = logging.getLogger(__name__)

T = TypeVar("T")

Numbers = NDArray[np.number[Any]]


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return a short hash of settings, given as plain data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_tables(folder: Path, tables: Mapping[str, Mapping[str, pa.Array]], meta: Mapping[str, Any]) -> None:
    """Write tables and a manifest with their checksums atomically.

    Args:
        folder: Output folder; replaced unless it is complete.
        tables: Columns of each table; tables without rows are not stored.
        meta: Plain data to store with the tables.
    """
    # `datasets` cannot read a table without rows.
    tables = {name: columns for name, columns in tables.items() if any(len(column) for column in columns.values())}
    _write(folder, lambda part: _save_datasets(part, tables), {"tables": list(tables), "meta": meta})


def open_tables(folder: Path) -> tuple[dict[str, pa.Table], dict[str, Any]] | None:
    """Open verified tables.

    Returns:
        Memory-mapped tables by name, and the plain data stored with them; ``None`` if there is no complete cache, with a warning if it is damaged.
    """
    from datasets import load_from_disk

    manifest = _open(folder)
    if manifest is None:
        return None
    # `Dataset.data` keeps the memory map; its columns are read directly, which is 100 times faster than decoding rows.
    return {name: load_from_disk(str(folder / name)).data.table for name in manifest["tables"]}, manifest["meta"]


def write_arrays(folder: Path, arrays: Mapping[str, Numbers], meta: Mapping[str, Any]) -> None:
    """Write arrays and a manifest with their checksums atomically; for random access by position.

    Args:
        folder: Output folder; replaced unless it is complete.
        arrays: Arrays by name.
        meta: Plain data to store with the arrays.
    """

    def save(part: Path) -> None:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)

    _write(folder, save, {"arrays": list(arrays), "meta": meta})


def open_arrays(folder: Path) -> tuple[dict[str, Numbers], dict[str, Any]] | None:
    """Open verified arrays.

    Returns:
        Memory-mapped, read-only arrays by name, and the plain data stored with them; ``None`` if there is no complete cache, with a
        warning if it is damaged.
    """
    manifest = _open(folder)
    if manifest is None:
        return None
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in manifest["arrays"]}, manifest["meta"]


def open_or_build(folder: Path, open_cache: Callable[[Path], T | None], build_cache: Callable[[Path], None], data: str) -> T:
    """Open a cache, and build it if it is missing or damaged.

    Args:
        folder: Folder of the cache.
        open_cache: Returns the content of a complete cache, else ``None``: :func:`open_tables` or :func:`open_arrays`.
        build_cache: Writes the cache to a folder.
        data: Name of the data in the log, e.g. ``the graph``.

    Raises:
        OSError: If the cache cannot be read after it was written.
    """
    if (found := open_cache(folder)) is not None:
        return found
    started = time.monotonic()
    build_cache(folder)
    log.info("prepared %s in %.1f s and stored it in %s", data, time.monotonic() - started, folder)
    if (found := open_cache(folder)) is None:
        raise OSError(f"the cache {folder} cannot be read right after it was written; check the disk, or choose another cache_dir")
    return found


def _write(folder: Path, save: Callable[[Path], None], manifest: Mapping[str, Any]) -> None:
    """Call ``save`` with a new folder, and add the manifest with checksums."""
    # Another process may have written the same content meanwhile; it is kept, because other processes may read it.
    with atomic_write(folder, keep=is_intact) as part:
        part.mkdir()
        save(part)
        seal(part, manifest)


def _open(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete cache, else ``None``."""
    recover(folder)  # a complete cache is not written again, so temporary folders of killed processes must be removed here
    if not folder.exists():
        return None
    if damage := find_damage(folder):
        log.warning("the cache %s %s: building it again", folder, damage)
        return None
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def _save_datasets(folder: Path, tables: Mapping[str, Mapping[str, pa.Array]]) -> None:
    from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        for name, columns in tables.items():
            Dataset.from_dict(dict(columns)).save_to_disk(str(folder / name))
    finally:
        if not silent:
            enable_progress_bars()
