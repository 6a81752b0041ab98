"""A folder of safetensors as a container: a PEFT adapter or a Hugging Face model; our section is its sub-folder ``patches``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from malleable.lightning_modules.patches.container import Container
from malleable.lightning_modules.patches.files import mirror, replacing
from malleable.lightning_modules.patches.names import canonical_names
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.safetensors_file import write_changed
from malleable.lightning_modules.patches.stack import Change, PatchStack

SECTION = "patches"
_ORDER = "stack.json"
_ORIGINALS = "originals.safetensors"


class StoredTensors(Mapping[str, Tensor]):
    """Tensors that are read from their files when asked for, one at a time.

    Args:
        places: File and key of each name.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.places[name]
        with safe_open(file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class WeightsFolder(Container):
    """A folder whose weights lie in one or more safetensors files.

    Args:
        path: The folder.

    Raises:
        ValueError: If its weights are of another format, or damaged.
    """

    tensors: StoredTensors

    def __init__(self, path: Path) -> None:
        self.path = path
        files = {key: file for file in _weight_files(path) for key in _keys(file)}
        self.tensors = StoredTensors({name: (files[key], key) for name, key in canonical_names(files).items()})
        self.stack = _read_section(path / SECTION)

    def _write(self, change: Change, target: Path) -> None:
        changed: dict[Path, dict[str, Tensor]] = {}
        for name, value in change.tensors.items():
            file, key = self.tensors.places[name]
            changed.setdefault(file, {})[key] = value
        with replacing(target, own_modes=True) as building:
            mirror(self.path, building, {SECTION, *(file.name for file in changed)}, link=target == self.path)
            for file, values in changed.items():
                write_changed(file, building / file.name, values)
            if change.stack.patches:
                write_section(building / SECTION, change.stack)


def _weight_files(folder: Path) -> list[Path]:
    for single in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / single).is_file():
            return [folder / single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} has no safetensors weights (model.safetensors, its sharded form, or adapter_model.safetensors); "
            "load what it holds and save it with save_pretrained of transformers or PEFT"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it maps no weights to files") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete: its index names {missing[0]} ({len(missing)} such files missing); download it again")
    return [folder / name for name in names]


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as stored:
            return list(stored.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _read_section(folder: Path) -> PatchStack:
    if not folder.exists():
        return PatchStack()
    try:
        section = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
        order, digests = list(section["order"]), dict(section["digests"])
    except FileNotFoundError as error:
        raise ValueError(f"{folder} was not written by malleable: it has no {_ORDER}; move it elsewhere, that name is needed for patches") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _ORDER} is damaged: {error}") from error
    try:
        originals = load_file(folder / _ORIGINALS) if digests else {}
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder / _ORIGINALS} is damaged: {error}") from error
    return PatchStack.checked(tuple(Patch.read(folder / id) for id in order), originals, digests, str(folder))


def write_section(folder: Path, stack: PatchStack) -> None:
    """Write what a folder of weights remembers of its patches, into its sub-folder :data:`SECTION`."""
    folder.mkdir()
    (folder / _ORDER).write_text(json.dumps({"order": list(stack.ids), "digests": dict(stack.digests)}, indent=1) + "\n", encoding="utf-8")
    if stack.originals:
        save_file(dict(stack.originals), folder / _ORIGINALS)
        shutil.copymode(folder / _ORDER, folder / _ORIGINALS)  # safetensors creates files for their owner only
    for patch in stack.patches:
        patch.write(folder / patch.id)
