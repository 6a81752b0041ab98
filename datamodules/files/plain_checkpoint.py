"""Loading of checkpoints as tensors and plain data, without running code from them, and error messages for saving them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.user_files import check_file, first_line, reading

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# Types of optional entries.
_ENTRIES: dict[str, type] = {
    "callbacks": dict,
    "catalog": dict,
    "epoch": int,
    "global_step": int,
    "graph": dict,
    "hyper_parameters": dict,
    "loops": dict,
    "lr_schedulers": list,
    "optimizer_states": list,
    "patches": dict,
    "settings": dict,
    "state_dict": dict,
    "tokenizer": dict,
    "vocabulary": dict,
}


def read_plain(path: Path | str, *, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint file to the CPU.

    Args:
        path: Checkpoint file.
        mmap: Memory-map tensors instead of reading them, if the format of the file allows it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a checkpoint, is damaged, or contains anything other than tensors and plain data.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    check_file(path, "give the file of a checkpoint")
    with reading(path):
        content = _load(path, mmap)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a checkpoint: it contains a {type(content).__name__} instead of a dictionary; give a checkpoint file")
    for name, kind in _ENTRIES.items():
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(
                f"{path} is not a checkpoint: its entry {name!r} is a {type(content[name]).__name__}, expected a {kind.__name__}; "
                "give a checkpoint file"
            )
    if wrong := next((key for name in ("state_dict", "hyper_parameters") for key in content.get(name) or () if not isinstance(key, str)), None):
        raise ValueError(f"{path} is not a checkpoint: {brief_repr(wrong)} is not the name of a tensor or argument; give a checkpoint file")
    return dict(content)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Convert errors of ``torch.save`` to errors that name the file. Use it within :func:`~malleable.datamodules.files.atomic.atomic_write`.

    Args:
        path: The file to replace, for messages.

    Raises:
        OSError: If the file could not be written.
    """
    try:
        yield
    except RuntimeError as error:  # raised by torch.save on a full disk
        raise OSError(f"{path} was not written (is the disk full? {first_line(error)}); an existing file is unchanged") from error


def _load(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _refusal(path, error) from error
    except Exception as error:  # damaged pickles cause various exceptions
        if mmap and "mmap can only be used" in str(error):  # written by torch before 1.6
            return _load(path, mmap=False)
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> ValueError:
    if found := _GLOBAL.search(str(error)):
        return ValueError(
            f"{path} contains more than tensors and plain data ({found[1]}), which is not loaded, because it could run code; give a checkpoint of "
            "malleable, or save its weights again as plain tensors"
        )
    reason = re.sub(r"Weights only load failed.*", "not a pickle of plain data", first_line(error))
    return ValueError(f"{path} cannot be read as a checkpoint: it is damaged, or another kind of file ({reason}); give a complete checkpoint")
