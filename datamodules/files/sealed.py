"""Folders with a manifest of the checksums of their files, which detects damaged files before they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malleable.datamodules.files.fetch import sha256_of

MANIFEST = "manifest.json"
SEAL = "seal"


def seal(folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write a manifest with the checksums of all files of a folder.

    Args:
        folder: Folder with all files except the manifest.
        manifest: Plain data to store with the checksums.
    """
    files = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    content = json.loads(json.dumps({"files": files, **(manifest or {})}))  # JSON types, as they are read again
    (folder / MANIFEST).write_text(json.dumps({SEAL: _digest(content), **content}))


def find_damage(folder: Path) -> str | None:
    """Return a description of the damage of a sealed folder, e.g. ``is corrupt (a.npy)``, or ``None`` if all checksums match."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        seal, files = content.pop(SEAL), content["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"is incomplete ({error})"
    if seal != _digest(content):
        return f"is corrupt ({MANIFEST})"
    broken = [name for name, sha256 in files.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha256]
    return f"is corrupt ({', '.join(broken[:3])})" if broken else None


def _digest(content: Mapping[str, Any]) -> str:
    """Return the checksum of the content of the manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_intact(folder: Path) -> bool:
    """Return whether a folder is sealed and all checksums match."""
    return find_damage(folder) is None
