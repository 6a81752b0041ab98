"""A Lightning checkpoint as a container: our section is its entry ``patches``."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.lightning_modules.patches.container import Container
from malleable.lightning_modules.patches.files import replacing
from malleable.lightning_modules.patches.names import canonical_names, untied
from malleable.lightning_modules.patches.stack import Change, PatchStack

SECTION = "patches"


class CheckpointFile(Container):
    """A checkpoint of one file, opened with plain data only and mapped into memory, not read.

    Args:
        path: The file.
        prefix: Where the model lies in the module whose checkpoint it is; other entries of ``state_dict`` are left alone.

    Raises:
        ValueError: If it is no such checkpoint, or holds no tensor under ``prefix``.
    """

    def __init__(self, path: Path, prefix: str = "model.") -> None:
        self.path = path
        self._content = _load(path)
        state = {key: value for key, value in self._content["state_dict"].items() if isinstance(value, Tensor)}
        if sparse := [key for key, value in state.items() if value.layout != torch.strided or value.is_meta or value.is_quantized]:
            raise ValueError(f"{path} holds sparse, quantised or empty tensors, such as {sparse[0]!r}, which cannot be patched")
        keys = canonical_names(state, prefix)
        if not keys:
            raise ValueError(f"{path} holds no tensor under {prefix!r} but e.g. {sorted(state)[:3]}; give the --prefix under which the model lies")
        named = {name: state[key] for name, key in keys.items()}
        aliases = untied(named)
        self._keys = {name: [keys[alias] for alias in names] for name, names in aliases.items()}
        self.tensors = {name: named[name] for name in aliases}
        self.stack = PatchStack.from_plain(self._content.get(SECTION), str(path))

    def _write(self, change: Change, target: Path) -> None:
        state = copy.copy(self._content["state_dict"])  # with the metadata that torch keeps on it
        for name, value in change.tensors.items():
            state.update(dict.fromkeys(self._keys[name], value))
        content = {**self._content, "state_dict": state}
        content.pop(SECTION, None)
        if change.stack.patches:
            content[SECTION] = change.stack.as_plain()
        with replacing(target, own_modes=True) as building:
            _save(content, building)
            shutil.copymode(self.path, building)


def _save(content: dict[str, Any], file: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error


def _load(path: Path) -> dict[str, Any]:
    content = read_plain(path)
    if "state_dict" not in content:
        raise ValueError(f"{path} is no Lightning checkpoint: it has no 'state_dict'")
    return content
