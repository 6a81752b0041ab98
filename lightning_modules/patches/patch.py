"""Patch of a model: changes of tensors with their requests and measurements, stored as a folder with a JSON and a safetensors file.

The fields of the JSON file are in :mod:`~malleable.lightning_modules.patches.manifest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.text_files import open_text
from malleable.datamodules.files.user_files import check_tree
from malleable.lightning_modules.patches.copy_folder import copy_folder
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.manifest import dump_manifest, parse_manifest, to_json, to_json_types
from malleable.lightning_modules.patches.tensors import load_tensors, tensor_bytes

MANIFEST = "patch.json"
DELTAS = "deltas.safetensors"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("lightning", "malleable", "peft", "safetensors", "torch", "transformers")}


@dataclass(frozen=True, eq=False)
class Patch:
    """Immutable change of a model.

    Attributes:
        kind: Method that made the patch, e.g. ``alpha_edit``.
        deltas: Changes by the name of the tensor in the bare Hugging Face model
            (:func:`~malleable.lightning_modules.patches.tensors.canonical_name`); empty for a patch that changes no weights.
        base: :func:`~malleable.lightning_modules.patches.tensors.fingerprint` of the complete model, without any patch, that the patch was made for;
            empty for a patch that does not depend on weights.
        title: One-line description.
        requests: Edit requests as plain dictionaries. Their results, under ``outcome``, do not affect the id.
        settings: Hyper-parameters.
        figures: Measurements ``{"before": {...}, "after": {...}}``; nan and infinite values become ``None``.
        requires: Ids of the patches that were applied when this patch was made, in order.
        created: Time in UTC, ISO 8601.
        libraries: Versions of the libraries that the patch was made with.
        folder: Folder that the patch was read from. :meth:`write` copies its other files.
        id: First 12 hexadecimal digits of a hash of kind, requests, base and deltas: equal edits have equal ids on every machine.

    Raises:
        ValueError: If the patch changes a tensor that is not in its base, or if a field is not plain data.
    """

    kind: str
    deltas: Mapping[str, Delta]
    base: Mapping[str, str]
    title: str = ""
    requests: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    requires: Sequence[str] = ()
    created: str = field(default_factory=_now)
    libraries: Mapping[str, str] = field(default_factory=_libraries)
    folder: Path | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        unnamed = sorted(self.deltas.keys() - self.base.keys())
        if unnamed:
            raise ValueError(
                f"a patch can only change tensors of its base, which does not contain {unnamed[0]!r} ({len(unnamed)} such tensors); "
                "pass the fingerprint of the whole model as base"
            )
        if not set(self.figures) <= {"before", "after"}:
            raise ValueError(f"figures may only have the keys 'before' and 'after', got {sorted(self.figures)}")
        for name in ("requests", "settings", "figures", "requires"):
            object.__setattr__(self, name, to_json_types(getattr(self, name), name))
        object.__setattr__(self, "id", self._content_hash())
        self.tensors()

    def _content_hash(self) -> str:
        requests = [{name: value for name, value in request.items() if name != "outcome"} for request in self.requests]
        state = hashlib.sha256(to_json([self.kind, requests, dict(self.base)]).encode())
        for name, delta in sorted(self.deltas.items()):
            for part in (delta.up, delta.down):
                if part is not None:
                    state.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
                    state.update(tensor_bytes(part))
        return state.hexdigest()[:12]

    def tensors(self) -> dict[str, Tensor]:
        """Return the content of ``deltas.safetensors``: ``name`` for a dense delta, ``name.up`` and ``name.down`` for a low-rank one."""
        stored: dict[str, Tensor] = {}
        for name, delta in sorted(self.deltas.items()):
            parts = {name: delta.up} if delta.down is None else {f"{name}.up": delta.up, f"{name}.down": delta.down}
            if stored.keys() & parts.keys():
                raise ValueError(f"two deltas would both be stored as {sorted(stored.keys() & parts.keys())[0]!r}; pass one of them as a dense delta")
            stored |= parts
        return stored

    def manifest(self) -> str:
        """Return the text of ``patch.json``."""
        forms: dict[str, Any] = {}
        for name, delta in self.deltas.items():
            form = {"form": "dense"} if delta.rank is None else {"form": "low_rank", "rank": delta.rank}
            forms[name] = {"shape": list(delta.shape), **form, "norm": delta.norm}
        copied = ("id", "kind", "created", "title", "requests", "settings", "figures", "requires")
        fields = {name: getattr(self, name) for name in copied}
        return dump_manifest({**fields, "base": dict(self.base), "libraries": dict(self.libraries), "tensors": forms})

    def write(self, folder: Path) -> Path:
        """Write the patch to a new folder atomically, and return the folder.

        Raises:
            FileExistsError: If the folder exists.
        """
        if folder.exists():
            raise FileExistsError(f"{folder} exists already, and patches are never overwritten; give another folder")
        with atomic_write(folder) as building:
            if self.folder is None:
                building.mkdir()
            else:
                copy_folder(self.folder, building, without={MANIFEST, DELTAS})
            (building / MANIFEST).write_text(self.manifest(), encoding="utf-8")
            if self.deltas:
                save_file(self.tensors(), building / DELTAS)
        return folder

    @classmethod
    def read(cls, folder: Path) -> Patch:
        """Read a patch folder.

        Raises:
            FileNotFoundError: If the folder is not a patch.
            ValueError: If a file is damaged, a link to a place outside the folder, a named pipe or a device, or if manifest and tensors do not match.
        """
        if not is_patch(folder):
            raise FileNotFoundError(f"{folder} is not a patch: it has no {MANIFEST}; give a folder that contains one")
        check_tree(folder)
        tensors = load_tensors(folder / DELTAS) if (folder / DELTAS).exists() else {}
        return cls.from_parts(_text(folder / MANIFEST), tensors, str(folder), folder)

    @classmethod
    def from_parts(cls, manifest: str, tensors: Mapping[str, Tensor], source: str, folder: Path | None = None) -> Patch:
        """Build a patch from the contents of its two files.

        Args:
            manifest: Text of ``patch.json``.
            tensors: Contents of ``deltas.safetensors``.
            source: Name of the source in error messages.
            folder: Folder of the files.

        Raises:
            ValueError: If the manifest is invalid, if it names other tensors, or if its id does not match the contents.
        """
        try:
            fields = parse_manifest(manifest)
        except ValueError as error:
            raise ValueError(f"{source}/{MANIFEST}: {error}") from error
        try:
            deltas = _deltas(fields["tensors"], tensors)
        except ValueError as error:
            raise ValueError(f"{source}/{DELTAS}: {error}") from error
        own = ("kind", "base", "title", "requests", "settings", "figures", "requires", "created", "libraries")
        try:
            patch = cls(deltas=deltas, folder=folder, **{name: fields[name] for name in own})
        except ValueError as error:
            raise ValueError(f"{source}/{MANIFEST}: {error}") from error
        if patch.id != fields["id"]:
            raise ValueError(f"{source} has id {fields['id']}, but its contents have id {patch.id}: a file was changed; copy the patch again")
        return patch


def is_patch(folder: Path) -> bool:
    """Return whether a folder is a patch."""
    return (folder / MANIFEST).is_file()


def read_patches(folder: Path) -> list[Patch]:
    """Read all patches directly in a folder, in order of creation; incomplete patches, which have hidden names, are skipped."""
    found = [path for path in folder.iterdir() if is_patch(path) and not path.name.startswith(".")]
    return sorted(map(Patch.read, found), key=lambda patch: (patch.created, patch.id))


def _text(path: Path) -> str:
    with open_text(path) as file:
        return file.read()


def _deltas(forms: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    named = {key for name, form in forms.items() for key in _keys(name, form)}
    if named != tensors.keys():
        missing, extra = sorted(named - tensors.keys()), sorted(tensors.keys() - named)
        raise ValueError(f"the tensors differ from the manifest: missing {missing[:3]}, unexpected {extra[:3]}; copy the patch again")
    deltas = {}
    for name, form in forms.items():
        try:
            deltas[name] = Delta(*(tensors[key] for key in _keys(name, form)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if list(deltas[name].shape) != form.get("shape"):
            raise ValueError(f"{name} has shape {list(deltas[name].shape)}, but {form.get('shape')} in the manifest; copy the patch again")
    return deltas


def _keys(name: str, form: Mapping[str, Any]) -> list[str]:
    return [f"{name}.up", f"{name}.down"] if form.get("form") == "low_rank" else [name]
