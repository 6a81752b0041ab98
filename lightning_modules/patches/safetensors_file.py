"""Files of safetensors: opened with errors that name them, and changed in some tensors while all else stays, byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from malleable.datamodules.files.user_files import check_file, reading
from malleable.lightning_modules.patches.fingerprint import raw


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a file as ``safetensors.safe_open`` does.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no regular file, damaged, or lacks a tensor that is read.
    """
    check_file(file, "give a whole folder or file of safetensors")
    with reading(file, "safetensors file"), safe_open(file, "pt") as stored:
        yield stored


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file; see :func:`open_tensors`."""
    with open_tensors(file) as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (no mapping)


def write_changed(source: Path, target: Path, values: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file with the values of some tensors replaced; the others are never in memory.

    The new file has the old one's header, so that putting the old values back gives the old file.

    Args:
        source: The file, not damaged.
        target: The copy.
        values: New values by key, with shapes and formats of the old ones.
    """
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        for key, value in values.items():
            start, end = header[key]["data_offsets"]
            data = raw(value)
            assert data.nbytes == end - start, f"{key} changes its size"
            file.seek(8 + header_size + start)
            file.write(data)
    shutil.copymode(source, target)
