"""New values in a safetensors file that otherwise stays as it is, byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from malleable.lightning_modules.patches.fingerprint import raw


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
