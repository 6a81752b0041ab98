"""A folder of safetensors as a container: a PEFT adapter or a Hugging Face model; our section is its sub-folder ``patches``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import check_tree, is_file_name, shard_names
from malleable.lightning_modules.patches.container import Container
from malleable.lightning_modules.patches.files import mirror, replacing
from malleable.lightning_modules.patches.names import canonical_names
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.safetensors_file import load_tensors, open_tensors, write_changed
from malleable.lightning_modules.patches.stack import Change, PatchStack

SECTION = "patches"
_ORDER = "stack.json"
_ORIGINALS = "originals.safetensors"
_ID = re.compile("[0-9a-f]{12}")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors that are read from their files when asked for, one at a time.

    Args:
        places: File and key of each name.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.places[name]
        with open_tensors(file) as stored:
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
        ValueError: If its weights are of another format, or damaged, or a file is a link that leads outside, a named pipe or a device.
    """

    tensors: StoredTensors

    def __init__(self, path: Path) -> None:
        check_tree(path)
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
    """Return the files that transformers and PEFT load."""
    if (folder / "adapter_config.json").is_file():
        if (folder / "adapter_model.safetensors").is_file():
            return [folder / "adapter_model.safetensors"]
        raise ValueError(f"{folder} is an adapter without adapter_model.safetensors; load it and save it with save_pretrained of PEFT")
    named = read_json(folder / "config.json")
    explicit = named.get("transformers_weights") if isinstance(named, dict) else None
    if explicit is not None and (not isinstance(explicit, str) or not is_file_name(explicit) or not (folder / explicit).is_file()):
        raise ValueError(f"{folder / 'config.json'}, field transformers_weights: {explicit!r:.200} is no file of the folder")
    if explicit and not explicit.endswith(".index.json"):
        return [folder / explicit]
    if not explicit and (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / (explicit or "model.safetensors.index.json")
    if not index.is_file():
        raise ValueError(
            f"{folder} has no safetensors weights (model.safetensors, its sharded form, or adapter_model.safetensors); "
            "load what it holds and save it with save_pretrained of transformers or PEFT"
        )
    names = shard_names(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete: its index names {missing[0]} ({len(missing)} such files missing); download it again")
    return [folder / name for name in names]


def _keys(file: Path) -> list[str]:
    with open_tensors(file) as stored:
        return list(stored.keys())


def _read_section(folder: Path) -> PatchStack:
    if not folder.exists():
        return PatchStack()
    if not (folder / _ORDER).exists():
        raise ValueError(f"{folder} was not written by malleable: it has no {_ORDER}; move it elsewhere, that name is needed for patches")
    try:
        section = read_json(folder / _ORDER)
    except ValueError as error:
        raise ValueError(f"{folder / _ORDER} is damaged: {error}") from error
    order, digests = (section.get(name) for name in ("order", "digests")) if isinstance(section, dict) else (None, None)
    if not isinstance(order, list) or not all(isinstance(id, str) and _ID.fullmatch(id) for id in order) or not isinstance(digests, dict):
        raise ValueError(f"{folder / _ORDER} is damaged: expected an object with order, a list of ids, and digests, an object")
    originals = load_tensors(folder / _ORIGINALS) if digests else {}
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
