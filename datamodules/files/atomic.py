"""Atomic replacement of files and folders."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OLD = ".old"


@contextmanager
def atomic_write(path: Path, keep: Callable[[Path], bool] | None = None, *, own_modes: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to; it replaces ``path`` when the block ends without an error.

    The temporary path has the same name as ``path`` and lies in a hidden folder ``.<name>.<random>.tmp`` beside it, on the same file
    system. Its content is flushed to the disk before the replacement. Files get the permissions that the umask leaves. A reader
    sees the old or the new content, never a part of it and never nothing (where the system cannot exchange two folders, a
    folder is absent for a moment, and the next write restores it after a crash). Several processes may write the same path:
    the last one wins. Temporary folders of processes that no longer exist are removed.

    Args:
        path: File or folder to write. Its parent is created. A symbolic link is followed.
        keep: Called with ``path`` if it exists when the block ends; where it returns true, ``path`` stays as it is.
        own_modes: Leave each file the permissions that the caller gave it, instead of those that the umask leaves.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with _temporary_folder(path) as folder:
        building = folder / path.name
        yield building
        if not own_modes:
            _set_mode(building, _umask_mode(folder))
        _flush(building)
        if keep is None or not path.exists() or not keep(path):
            _replace(building, path)
            _flush_one(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder while it is read, changed and written by :func:`atomic_write`: one process at a time.

    What is locked is what lies at ``path``. A process that has waited while another one replaced that locks its successor. File systems without
    locks do not exclude anyone.

    Args:
        path: File or folder, which must exist.
    """
    while True:
        descriptor = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at a path, and not one that was there before."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def recover(path: Path) -> None:
    """Put back a folder that a process which was killed while it replaced it had moved aside, and remove what it left; see :func:`atomic_write`."""
    _remove_abandoned(Path(os.path.realpath(path)))


def recover_below(folder: Path) -> None:
    """Do as :func:`recover` for everything below a folder, such as that of a run which was killed."""
    for item in list(folder.rglob(".*.tmp")):
        name = item.name[1 : -len(".tmp")].rpartition(".")[0]
        if name:
            recover(item.with_name(name))


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Create a folder beside ``path`` and hold its lock, which marks it as in use until this process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        # Before it is locked, another process may take it for abandoned and remove it.
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks, where nothing abandoned is removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of dead processes; put back what one of them had moved aside."""
    for folder in list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp")):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (old := folder / f"{path.name}{_OLD}").exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # in use, or nothing is known about it
        finally:
            os.close(descriptor)


def _replace(building: Path, path: Path) -> None:
    """Move ``building`` to ``path`` in one step; what was there lies in the temporary folder afterwards, which is removed."""
    if not building.is_dir():
        building.replace(path)
        return
    for _ in range(100):
        try:
            building.rename(path)  # nothing there, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        if _exchange(building, path):
            return
        # Not possible here, or another process has just moved the folder aside.
        with contextlib.suppress(FileNotFoundError):
            path.rename(building.with_name(f"{path.name}{_OLD}"))
    raise OSError(f"{path} was not written: other processes replace it all the time")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; return whether the system did."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _umask_mode(folder: Path) -> int:
    """Return the permissions of a new file: the umask itself cannot be read without setting it for all threads."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def _set_mode(path: Path, mode: int) -> None:
    """Add permissions to the files that a library has created for their owner only."""
    for item in (*path.rglob("*"), path):
        # A second name of a file elsewhere keeps the permissions that it has there.
        if item.is_file() and not item.is_symlink() and (stat := item.stat()).st_nlink == 1:
            item.chmod(stat.st_mode & 0o7777 | mode)


def _flush(path: Path) -> None:
    for item in (*path.rglob("*"), path):
        if not item.is_symlink():
            _flush_one(item)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
