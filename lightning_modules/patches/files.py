"""Files and folders that are either whole or not there, also after a crash."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or folder to, which takes the place of ``path`` when the block ends well.

    A file is replaced in one step. A folder is swapped by renames: a crash between them leaves the old and the new one under
    hidden names, and :func:`recover` puts the new one in place. Of several processes that write to one folder, each waits for
    the one before it; what they read before is not guarded.

    Raises:
        OSError: If the system does not let it be written; nothing has changed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        _put_right(path)
        building, ready, old = _hidden(path)
        try:
            yield building
            _flush(building)
            if path.is_dir():
                building.rename(ready)
                path.rename(old)
                ready.rename(path)
            else:
                building.replace(path)
        except OSError as error:
            raise OSError(f"{path} was not written, and nothing has changed: {error}") from error
        finally:
            _put_right(path)
        _flush_one(path.parent)


def recover(path: Path) -> None:
    """Finish or undo what a crash has left of a replacement of ``path``; one that is under way is let alone."""
    if path.parent.is_dir():
        with _locked(path.parent, wait=not path.exists()) as locked:
            if locked:
                _put_right(path)


def _put_right(path: Path) -> None:
    building, ready, old = _hidden(path)
    if old.exists() and not path.exists():
        (ready if ready.exists() else old).rename(path)
    for left in (building, ready, old):
        _remove(left)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which the system frees when a process dies; tell whether it is held."""
    descriptor = os.open(folder, os.O_RDONLY)
    held = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        held = False
    except OSError:
        pass  # a file system without locks
    try:
        yield held
    finally:
        os.close(descriptor)


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


def _hidden(path: Path) -> list[Path]:
    return [path.with_name(f".{path.name}.patching-{state}") for state in ("building", "ready", "old")]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder and all in it, to the disk: a rename must not outlive what it names."""
    for item in (*path.rglob("*"), path):
        if not item.is_symlink():
            _flush_one(item)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
