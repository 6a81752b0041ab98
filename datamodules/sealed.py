"""Folders with a list of their files' checksums: what is not as it was written is found before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malleable.datamodules.fetch import sha256_of

MANIFEST = "manifest.json"


def seal(folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Write the checksums of all files of a folder into its manifest.

    Args:
        folder: Complete but for the manifest.
        manifest: Plain data to store beside the checksums.
    """
    files = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": files, **(manifest or {})}))


def problem(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder; ``None`` where every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"is not whole ({error})"
    broken = [name for name, sha256 in files.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha256]
    return f"is corrupt ({', '.join(broken[:3])})" if broken else None


def is_whole(folder: Path) -> bool:
    """Return whether a folder is sealed and every file is as it was written."""
    return problem(folder) is None
