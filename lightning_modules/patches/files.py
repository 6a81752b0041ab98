"""Files and folders of patched weights: written whole or not at all, and copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from malleable.datamodules.files.atomic import atomic_write


@contextmanager
def replacing(path: Path, *, own_modes: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to, which replaces ``path``.

    See :func:`~malleable.datamodules.files.atomic.atomic_write`.

    Raises:
        OSError: If the system does not let it be written; nothing has changed then.
    """
    try:
        with atomic_write(path, own_modes=own_modes) as building:
            yield building
    except OSError as error:
        raise OSError(f"{path} was not written, and nothing has changed: {error}") from error


def mirror(source: Path, target: Path, without: Collection[str] = (), *, link: bool = False) -> None:
    """Copy a folder.

    Args:
        source: The folder.
        target: Where to; must not exist.
        without: Names at its top that are left out.
        link: Share the files by hard links where the file system can, and keep symbolic links: for a folder that takes the
            place of ``source``.
    """

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in without] if Path(folder) == source else []

    shutil.copytree(source, target, ignore=left_out, copy_function=_link_or_copy if link else shutil.copy2, symlinks=link)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
