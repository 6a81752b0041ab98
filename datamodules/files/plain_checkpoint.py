"""Checkpoints read as tensors and plain data: nothing in them runs code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from malleable.datamodules.files.user_files import check_file, first_line, reading

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# Types of entries, where they are there.
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
    """Read a checkpoint of one file onto the CPU.

    Args:
        path: The file.
        mmap: Map tensors into memory instead of reading them, where the format of the file allows it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, damaged, or holds more than tensors and plain data.
        OSError: If the system does not let it be read.
    """
    path = Path(path)
    check_file(path, "give the file of a checkpoint")
    with reading(path):
        content = _load(path, mmap)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not entries by name")
    for name, kind in _ENTRIES.items():
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(f"{path} is no checkpoint: its entry {name!r} is a {type(content[name]).__name__}, not a {kind.__name__}")
    if wrong := next((key for name in ("state_dict", "hyper_parameters") for key in content.get(name) or () if not isinstance(key, str)), None):
        raise ValueError(f"{path} is no checkpoint: {wrong!r:.80} is no name of a tensor or an argument")
    return dict(content)


def _load(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _refusal(path, error) from error
    except Exception as error:  # the reader of pickles raises errors of many kinds
        if mmap and "mmap can only be used" in str(error):  # written by torch before 1.6
            return _load(path, mmap=False)
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> ValueError:
    if found := _GLOBAL.search(str(error)):
        return ValueError(
            f"{path} holds more than tensors and plain data ({found[1]}), which is never loaded, as it could run code; give a checkpoint of "
            "malleable, or save its weights again as plain tensors"
        )
    reason = re.sub(r"Weights only load failed.*", "not a pickle of plain data", first_line(error))
    return ValueError(f"{path} does not open as a checkpoint of plain data: it is damaged, or of another kind ({reason}); give a whole checkpoint")
