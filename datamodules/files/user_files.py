"""Checks of files given by users, and conversion of errors to messages with file and remedy. Standard library only."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from malleable.datamodules.files.escape import brief_repr

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_PARSERS = (json.JSONDecodeError, UnicodeError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError)
# Base classes of the errors of libraries that are not imported here.
_LIBRARIES = {
    "ArrowException": "Arrow or Parquet",
    "SafetensorError": "safetensors",
    "YAMLError": "YAML",
    "ParserError": "a text table",
    "EmptyDataError": "a text table",
}
_NAMES = {
    "JSONDecodeError": "JSON",
    "UnicodeDecodeError": "text",
    "UnicodeEncodeError": "text",
    "BadGzipFile": "gzip",
    "BadZipFile": "zip",
    "UnpicklingError": "a checkpoint of plain data",
    "error": "compressed data",
}
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space, or write elsewhere",
    errno.EFBIG: "the file is larger than this system allows (ulimit -f): raise the limit, or write elsewhere",
    errno.EACCES: "permission denied: change the permissions, or give another path",
    errno.EPERM: "not permitted: change the permissions, or give another path",
    errno.EROFS: "the file system is read-only: give another path",
    errno.ENOENT: "the file or folder does not exist",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "it exists already",
    errno.ELOOP: "its symbolic links form a cycle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many files are open (ulimit -n): raise the limit",
    errno.ENOMEM: "there is not enough memory",
}


def check_file(path: Path, advice: str = "give the path of an existing file") -> None:
    """Check that a path is a regular file or a link to one, without opening it.

    Opening a named pipe would wait for a writer, and reading a device would not end.

    Args:
        path: The path.
        advice: What the user should do; the end of the error message.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it is a folder, a named pipe, a socket or a device.
        OSError: If the system denies access.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"the file {path} does not exist; {advice}") from None
    except ValueError:  # a NUL character
        raise FileNotFoundError(f"{str(path)!r} cannot be the name of a file; {advice}") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {system_problem(error)}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for check, name in _KINDS if check(mode)), "of an unknown kind")
        raise ValueError(f"{path} is {kind}, not a file; {advice}")


@contextmanager
def reading(path: Path | str, kind: str = "") -> Iterator[None]:
    """Convert errors of the system and of parsers to errors that name the file. Other errors are not changed.

    Args:
        path: The file, for messages.
        kind: Expected kind of the file, e.g. ``a Parquet file``. Default: derived from the parser.

    Raises:
        ValueError: If the file is damaged or of another kind.
        OSError: If the file cannot be read.
    """
    try:
        yield
    except Exception as error:
        if (problem := format_problem(error, kind)) is not None:
            raise ValueError(f"{path} {problem}; give a complete file, for example by downloading or writing it again") from error
        if _system_number(error):
            kind_of = type(error) if type(error).__module__ == "builtins" else OSError
            raise kind_of(f"{path} cannot be read: {system_problem(error)}") from error
        raise


def format_problem(error: BaseException, kind: str = "") -> str | None:
    """Return the description of a parser error, e.g. ``is damaged, or not gzip (...)``; ``None`` for other errors.

    Args:
        error: The error.
        kind: Expected kind of the file. Default: derived from the parser.
    """
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not _is_format_error(error) or _system_number(error):
        return None
    names = [base.__name__ for base in type(error).__mro__]
    found = next((_LIBRARIES[name] for name in names if name in _LIBRARIES), None) or _NAMES.get(names[0], "a file of the expected kind")
    return f"is damaged, or not {kind or found} ({first_line(error)})"


def _is_format_error(error: BaseException) -> bool:
    if isinstance(error, _PARSERS):
        return True
    if isinstance(error, OSError) and error.errno is None:
        # pyarrow raises such errors for damaged data, gzip and torch for truncated files.
        return type(error) is OSError and not is_own_error(error)
    return any(base.__name__ in _LIBRARIES for base in type(error).__mro__)


def is_own_error(error: BaseException) -> bool:
    """Return whether an error was raised in code of this package."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    return str(name).partition(".")[0] == "malleable"


def _system_number(error: BaseException) -> int | None:
    """Return the number of a system error; Rust libraries include it in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if _is_format_error(error) else None
    return int(found[1]) if found else None


def system_problem(error: BaseException) -> str | None:
    """Return description and remedy of a system error; ``None`` for other errors."""
    number = _system_number(error)
    return None if number is None else _REMEDIES.get(number, getattr(error, "strerror", None) or os.strerror(number))


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, shortened; the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def check_inside(path: Path, root: Path) -> None:
    """Check that a path is, after resolving links, a regular file or a folder inside another folder.

    Args:
        path: The path.
        root: The folder. For a snapshot in the cache of the Hugging Face hub, whose files are links, links within the repository are allowed.

    Raises:
        ValueError: If it is outside the folder, or a named pipe, a socket or a device.
    """
    root = Path(os.path.realpath(root))
    if root.parent.name == "snapshots":
        root = root.parent.parent
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise ValueError(f"{path} is a link to {real}, outside its folder; replace it by a copy of the file")
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder; remove it")


def check_tree(folder: Path) -> None:
    """Apply :func:`check_inside` to every file and folder below a folder.

    Raises:
        ValueError: If one is outside the folder, or a named pipe, a socket or a device.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            check_inside(Path(parent) / name, folder)


def check_model_folder(folder: Path) -> None:
    """Check the folder of a model, an adapter or a tokenizer before a library reads it.

    Raises:
        ValueError: If a file is a link to a file outside the folder, a named pipe or a device, or if an index refers to a file in another folder.
    """
    for path in folder.iterdir():
        check_inside(path, folder)
        if path.name.endswith(".index.json") and path.is_file():
            shard_names(path)


def is_file_name(name: str) -> bool:
    """Return whether a string is a valid name of a file, without a folder."""
    return (
        name not in ("", "..")
        and Path(name).name == name
        and "\0" not in name
        and len(name.encode(errors="replace")) < 256
        and not any("\ud800" <= part <= "\udfff" for part in name)
    )


def shard_names(index: Path) -> list[str]:
    """Return the names of the files in the index of a sharded model.

    Raises:
        ValueError: If the index is damaged, or refers to a file in another folder.
    """
    with reading(index, "JSON"):
        content = json.loads(index.read_text(encoding="utf-8"))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is damaged: it has no valid weight_map; download the model again")
    names = sorted(set(shards.values()))
    wrong = next((name for name in names if not is_file_name(name)), None)
    if wrong is not None:
        raise ValueError(
            f"{index} refers to {brief_repr(wrong, 200)}, which is not a file name in its folder; put all files of the model into one folder"
        )
    return names
