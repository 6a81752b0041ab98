"""Copies of folders of weights, with hard links if possible."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path


def copy_folder(source: Path, target: Path, without: Collection[str] = (), *, link: bool = False) -> None:
    """Copy a folder.

    Args:
        source: Folder to copy.
        target: Path of the copy; must not exist.
        without: Names of files and folders at the top level of ``source`` that are not copied.
        link: Create hard links instead of copies if the file system supports them, and keep symbolic links. Use this only if the copy replaces
            ``source``.
    """

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in without] if Path(folder) == source else []

    shutil.copytree(source, target, ignore=ignored, copy_function=_link_or_copy if link else shutil.copy2, symlinks=link)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
