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
    """Yield a temporary path for a file or a folder, which replaces ``path`` when the context ends without an error.

    The temporary path has the same name as ``path`` and is in a hidden folder ``.<name>.<random>.tmp`` in the same parent folder. Its content is
    flushed to the disk before the replacement. Files get the permissions of the umask. A reader sees either the old or the new content. If the system
    cannot exchange two folders, a folder does not exist for a moment, and the next write restores it after a crash. If several processes write the
    same path, the content of the last one is kept. Temporary folders of processes that no longer exist are removed. A reader of a file that is
    written only once calls :func:`recover` to remove them.

    Args:
        path: File or folder to write. Its parent is created. A symbolic link is followed.
        keep: Called with ``path`` if it exists at the end of the context; if it returns true, ``path`` is not replaced.
        own_modes: Keep the permissions that the caller has set, instead of those of the umask.

    Raises:
        OSError: If writing fails; ``path`` has not changed then.
    """
    path = Path(os.path.realpath(path))
    _remove_abandoned(path)
    with temporary_folder(path) as folder:
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
    """Hold an exclusive lock of a file or folder while it is read, changed and written by :func:`atomic_write`.

    If another process replaces ``path`` while this one waits, the new file is locked. On file systems without locks, this context has no effect.

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
    """Return whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def recover(path: Path) -> None:
    """Restore a folder that a killed process has moved while replacing it, and remove its temporary folders; see :func:`atomic_write`."""
    _remove_abandoned(Path(os.path.realpath(path)))


def recover_below(folder: Path) -> None:
    """Apply :func:`recover` to all files and folders below a folder, e.g. after a run was killed."""
    for item in list(folder.rglob(".*.tmp")):
        name = item.name[1 : -len(".tmp")].rpartition(".")[0]
        if name:
            recover(item.with_name(name))


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder in the parent folder of ``path``. It is removed at the end of the context.

    A lock marks it as in use until this process ends. :func:`recover` and :func:`recover_below` remove the folder of a process that was killed.

    Args:
        path: File or folder whose parts are written to the temporary folder. Its parent is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        # Before the folder is locked, another process may consider it abandoned and remove it.
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks, on which no folder is considered abandoned
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
    """Remove the temporary folders of processes that no longer exist, and restore a folder that one of them has moved."""
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
            pass  # in use, or a file system without locks
        finally:
            os.close(descriptor)


def _replace(building: Path, path: Path) -> None:
    """Move ``building`` to ``path`` atomically; the old content is moved to the temporary folder, which is removed later."""
    if not building.is_dir():
        building.replace(path)
        return
    for _ in range(100):
        try:
            building.rename(path)  # succeeds if there is nothing, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        if _exchange(building, path):
            return
        # The system cannot exchange folders, or another process has just moved the folder.
        with contextlib.suppress(FileNotFoundError):
            path.rename(building.with_name(f"{path.name}{_OLD}"))
    raise OSError(f"{path} was not written: other processes replaced it in each of 100 attempts; write to another path")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; return whether the system supports it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _umask_mode(folder: Path) -> int:
    """Return the permissions of a new file; the umask cannot be read without setting it for all threads."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def _set_mode(path: Path, mode: int) -> None:
    """Add permissions to files, because some libraries create files that only their owner can read."""
    for item in (*path.rglob("*"), path):
        # Hard links keep the permissions of the original file.
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
