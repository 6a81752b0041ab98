"""Tensors in a safetensors file with a checksum: a changed bit is found when the file is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.user_files import first_line
from malleable.lightning_modules.patches.tensors import open_tensors, raw

CHECKSUM = "sha256"


def save_verified(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts, with the checksum of both.

    Args:
        tensors: Tensors on the CPU by name.
        path: The file.
        about: Texts by name, stored in the header.
    """
    about = dict(about or {})
    save_file(dict(tensors), path, {**about, CHECKSUM: _checksum(tensors, about)})


def load_verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_verified` wrote. A file of an earlier version, which has no checksum, is read unchecked.

    Returns:
        The tensors and the texts.

    Raises:
        ValueError: If the file is not whole, or its content is not what was written.
    """
    try:
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            about = dict(file.metadata() or {})
    except ValueError as error:  # callers say what to do
        raise ValueError(f"{path} is damaged ({first_line(error.__cause__ or error)})") from error
    checksum = about.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(tensors, about):
        raise ValueError(f"{path} is damaged (its checksum is another one)")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value))
    return digest.hexdigest()
