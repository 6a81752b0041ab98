"""A folder of memory-mapped Arrow tables, written once, verified when opened, and shared by all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from malleable.datamodules.fetch import sha256_of

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short fingerprint of plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_tables(folder: Path, tables: Mapping[str, Mapping[str, pa.Array]], meta: Mapping[str, Any]) -> None:
    """Write tables, and a manifest with their checksums, under a temporary name, then rename.

    Args:
        folder: Where the tables shall lie; replaced unless it is whole.
        tables: Columns by table; a table without rows is not kept.
        meta: Plain data to keep beside them.
    """
    # `datasets` cannot read a table without rows.
    tables = {name: columns for name, columns in tables.items() if any(len(column) for column in columns.values())}
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _save_datasets(part, tables)
        files = {str(path.relative_to(part)): sha256_of(path) for path in sorted(part.rglob("*")) if path.is_file()}
        (part / MANIFEST).write_text(json.dumps({"files": files, "tables": list(tables), "meta": meta}))
        # What another process of this machine has written meanwhile is the same: it stays, for others read it.
        if _problem(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_tables(folder: Path) -> tuple[dict[str, pa.Table], dict[str, Any]] | None:
    """Open verified tables.

    Returns:
        Tables by name, memory-mapped, and the plain data kept beside them; ``None`` (with a warning if there is something) where
        there is no whole cache.
    """
    from datasets import load_from_disk

    if not folder.exists():
        return None
    if problem := _problem(folder):
        log.warning("the cache %s %s: building it again", folder, problem)
        return None
    manifest = json.loads((folder / MANIFEST).read_text())
    # `Dataset.data` keeps the memory map; its columns are read directly, which is 100 times faster than decoding rows.
    return {name: load_from_disk(str(folder / name)).data.table for name in manifest["tables"]}, manifest["meta"]


def _problem(folder: Path) -> str | None:
    """Say what is wrong with a cache; ``None`` where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"is not whole ({error})"
    broken = [name for name, sha256 in files.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha256]
    return f"is corrupt ({', '.join(broken[:3])})" if broken else None


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
