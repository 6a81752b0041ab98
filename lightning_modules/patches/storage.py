"""Storage of patched weights: a Lightning checkpoint, a PEFT adapter folder or a Hugging Face model folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.atomic import atomic_write, recover
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.plain_checkpoint import read_plain, saving
from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import check_tree, is_file_name, shard_names
from malleable.lightning_modules.patches.copy_folder import copy_folder
from malleable.lightning_modules.patches.patch import Patch, is_patch
from malleable.lightning_modules.patches.stack import Change, PatchStack
from malleable.lightning_modules.patches.tensors import canonical_names, group_tied, load_tensors, open_tensors, write_changed

SECTION = "patches"
"""Entry of a checkpoint, or sub-folder of a model folder, that holds the patches."""
_ORDER = "stack.json"
_ORIGINALS = "originals.safetensors"
_ID = re.compile("[0-9a-f]{12}")
# Files that DeepSpeed and sharded strategies of Lightning write into a checkpoint folder.
_SHARDED = ("latest", "zero_to_fp32.py", "checkpoint", ".metadata", "meta.pt")


class Container(ABC):
    """Stored weights and the patches applied to them.

    Attributes:
        path: File or folder, with symbolic links resolved.
        tensors: Stored weights by canonical name, read on access. Tied tensors occur once.
        stack: Patches applied.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    stack: PatchStack

    def write(self, change: Change, out: Path | None = None) -> Path:
        """Write the changed weights atomically, and return the path.

        Other stored content is kept. This object still has the state before the change; open the path again to read the new state.

        Args:
            change: A change of :attr:`tensors`, as returned by :attr:`stack`. An empty stack removes the section of patches.
            out: Output path. Default: replace the stored weights.

        Raises:
            FileExistsError: If ``out`` exists.
            OSError: If writing fails; nothing has changed then.
        """
        if out is not None and out.exists():
            raise FileExistsError(f"{out} exists already; give a new path with --out, or omit --out to change {self.path} itself")
        self._write(change, self.path if out is None else out)
        return out or self.path

    @abstractmethod
    def _write(self, change: Change, target: Path) -> None:
        """Write to ``target``, which is ``self.path`` or does not exist."""


class CheckpointFile(Container):
    """Lightning checkpoint in one file, opened without pickle and memory-mapped.

    Args:
        path: Checkpoint file.
        prefix: Prefix of the model's parameters in ``state_dict``; other entries are kept.

    Raises:
        ValueError: If the file is not a Lightning checkpoint, or has no tensor under ``prefix``.
    """

    def __init__(self, path: Path, prefix: str = "model.") -> None:
        self.path = path
        self._content = _load(path)
        state = {key: value for key, value in self._content["state_dict"].items() if isinstance(value, Tensor)}
        if sparse := [key for key, value in state.items() if value.layout != torch.strided or value.is_meta or value.is_quantized]:
            raise ValueError(f"{path} contains sparse, quantised or meta tensors, such as {sparse[0]!r}, which cannot be patched; save dense tensors")
        keys = canonical_names(state, prefix)
        if not keys:
            raise ValueError(
                f"{path} has no tensor with the prefix {prefix!r}, but e.g. {sorted(state)[:3]}; give the --prefix of the model's tensors"
            )
        named = {name: state[key] for name, key in keys.items()}
        aliases = group_tied(named)
        self._keys = {name: [keys[alias] for alias in names] for name, names in aliases.items()}
        self.tensors = {name: named[name] for name in aliases}
        self.stack = PatchStack.from_plain(self._content.get(SECTION), str(path))

    def _write(self, change: Change, target: Path) -> None:
        state = copy.copy(self._content["state_dict"])  # keeps the metadata attribute of torch
        for name, value in change.tensors.items():
            state.update(dict.fromkeys(self._keys[name], value))
        content = {**self._content, "state_dict": state}
        content.pop(SECTION, None)
        if change.stack.patches:
            content[SECTION] = change.stack.as_plain()
        with atomic_write(target, own_modes=True) as building:
            with saving(target):
                torch.save(content, building)
            shutil.copymode(self.path, building)


def _load(path: Path) -> dict[str, Any]:
    content = read_plain(path)
    if "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no 'state_dict'; give a checkpoint, or the folder of a model or adapter")
    return content


class StoredTensors(Mapping[str, Tensor]):
    """Mapping that reads one tensor at a time from safetensors files.

    Args:
        places: File and key of each tensor name.
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
    """A Hugging Face model folder or PEFT adapter folder with one or more safetensors files.

    Args:
        path: The folder.

    Raises:
        ValueError: If the weights have another format or are damaged, or if a file is a link to a place outside the folder, a named pipe or a device.
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
        with atomic_write(target, own_modes=True) as building:
            copy_folder(self.path, building, {SECTION, *(file.name for file in changed)}, link=target == self.path)
            for file, values in changed.items():
                write_changed(file, building / file.name, values)
            if change.stack.patches:
                write_section(building / SECTION, change.stack)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers and PEFT load."""
    if (folder / "adapter_config.json").is_file():
        if (folder / "adapter_model.safetensors").is_file():
            return [folder / "adapter_model.safetensors"]
        raise ValueError(f"{folder} is an adapter without adapter_model.safetensors; load it and save it again with save_pretrained of PEFT")
    named = read_json(folder / "config.json")
    explicit = named.get("transformers_weights") if isinstance(named, dict) else None
    if explicit is not None and (not isinstance(explicit, str) or not is_file_name(explicit) or not (folder / explicit).is_file()):
        raise ValueError(
            f"{folder / 'config.json'}, field transformers_weights: expected the name of a file in the folder, got {brief_repr(explicit, 200)}; "
            "copy the model again"
        )
    if explicit and not explicit.endswith(".index.json"):
        return [folder / explicit]
    if not explicit and (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / (explicit or "model.safetensors.index.json")
    if not index.is_file():
        raise ValueError(
            f"{folder} has no safetensors weights (model.safetensors, its sharded form, or adapter_model.safetensors); "
            "load the model and save it again with save_pretrained of transformers or PEFT"
        )
    names = shard_names(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is incomplete: {missing[0]} of its index is missing ({len(missing)} files in all); download the model again")
    return [folder / name for name in names]


def _keys(file: Path) -> list[str]:
    with open_tensors(file) as stored:
        return list(stored.keys())


def _read_section(folder: Path) -> PatchStack:
    if not folder.exists():
        return PatchStack()
    if not (folder / _ORDER).exists():
        raise ValueError(f"{folder} was not written by malleable: it has no {_ORDER}; rename the folder, because patches are stored under this name")
    try:
        section = read_json(folder / _ORDER)
    except ValueError as error:
        raise ValueError(f"{folder / _ORDER} is damaged: {error}; copy the model again") from error
    order, hashes = (section.get(name) for name in ("order", "digests")) if isinstance(section, dict) else (None, None)
    if not isinstance(order, list) or not all(isinstance(id, str) and _ID.fullmatch(id) for id in order) or not isinstance(hashes, dict):
        raise ValueError(f"{folder / _ORDER} is damaged: field 'order' must be an array of ids, and field 'digests' an object; copy the model again")
    originals = load_tensors(folder / _ORIGINALS) if hashes else {}
    return PatchStack.checked(tuple(Patch.read(folder / id) for id in order), originals, hashes, str(folder))


def write_section(folder: Path, stack: PatchStack) -> None:
    """Write patches, their order and the original values of the tensors that they change to ``folder``, a new sub-folder of a weights folder."""
    folder.mkdir()
    (folder / _ORDER).write_text(json.dumps({"order": list(stack.ids), "digests": dict(stack.hashes)}, indent=1) + "\n", encoding="utf-8")
    if stack.originals:
        save_file(dict(stack.originals), folder / _ORIGINALS)
        shutil.copymode(folder / _ORDER, folder / _ORIGINALS)  # safetensors creates files for their owner only
    for patch in stack.patches:
        patch.write(folder / patch.id)


def open_container(path: str | Path, prefix: str = "model.") -> Container:
    """Open stored weights, after recovery from a write that was interrupted.

    Args:
        path: Lightning checkpoint file, or folder of a PEFT adapter or a Hugging Face model (safetensors).
        prefix: Prefix of the model's parameters in a Lightning checkpoint.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If it contains no supported weights, or is damaged.
    """
    path = Path(path).resolve()
    recover(path)
    if path.is_file():
        return CheckpointFile(path, prefix)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint, or the folder of a model or adapter")
    if is_patch(path):
        raise ValueError(f"{path} is a patch, not weights; give a checkpoint, or the folder of a model or adapter")
    if is_weights_folder(path):
        return WeightsFolder(path)
    if any((path / name).exists() for name in _SHARDED):
        raise ValueError(f"{path} is a sharded checkpoint; {_one_file(path)}")
    raise ValueError(f"{path} contains no weights; give a folder with config.json (model) or adapter_config.json (adapter), or a checkpoint file")


def is_weights_folder(path: Path) -> bool:
    """Return whether a path is a model folder or an adapter folder."""
    return any((path / name).is_file() for name in ("adapter_config.json", "config.json"))


def _one_file(folder: Path) -> str:
    whole = folder.with_name(f"consolidated-{folder.name}")
    if whole.is_file():
        return f"give the consolidated checkpoint, {whole}"
    if (folder / "latest").exists():
        return f"run `malleable test --ckpt_path {folder}` with its recipe, which writes a consolidated checkpoint beside it, and give that"
    return f"run `python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}`, and give the consolidated checkpoint that it writes"
