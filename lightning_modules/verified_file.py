"""Safetensors files with a checksum, which is verified when a file is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.user_files import first_line
from malleable.lightning_modules.patches.tensors import open_tensors, tensor_bytes

CHECKSUM = "sha256"


def save_verified(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata, with a checksum of both.

    Args:
        tensors: Tensors on the CPU by name.
        path: File to write.
        about: Metadata, stored in the header.
    """
    about = dict(about or {})
    save_file(dict(tensors), path, {**about, CHECKSUM: _checksum(tensors, about)})


def load_verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that :func:`save_verified` has written. A file of an earlier version, without a checksum, is not verified.

    Returns:
        The tensors and the metadata.

    Raises:
        ValueError: If the file is incomplete or its checksum does not match.
    """
    try:
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            about = dict(file.metadata() or {})
    except ValueError as error:  # callers add what to do
        raise ValueError(f"{path} is damaged ({first_line(error.__cause__ or error)})") from error
    checksum = about.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(tensors, about):
        raise ValueError(f"{path} is damaged (its checksum does not match)")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()
