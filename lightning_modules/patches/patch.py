"""A patch: what is added to which tensors, why, and with which effect; a folder of one JSON and one safetensors file."""

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

from malleable.datamodules.files.text_files import open_text
from malleable.datamodules.files.user_files import check_tree
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.files import mirror, replacing
from malleable.lightning_modules.patches.manifest import dump_manifest, parse_manifest, plain, to_json
from malleable.lightning_modules.patches.tensors import load_tensors, raw

MANIFEST = "patch.json"
DELTAS = "deltas.safetensors"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("lightning", "malleable", "peft", "safetensors", "torch", "transformers")}


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of a model, made once and never altered.

    Attributes:
        kind: What made it, e.g. ``alpha_edit``.
        deltas: What it adds, by canonical tensor name; empty for a change that touches no weight.
        base: :func:`~malleable.lightning_modules.patches.tensors.fingerprint` of the whole model that it was made on, as that is
            without any patch; empty for a change that is bound to no weights.
        title: A line for the reader.
        requests: What was asked for, one plain dictionary each; what came of it, under ``outcome``, does not count for the id.
        settings: Hyper-parameters.
        figures: Measurements ``{"before": {...}, "after": {...}}``; undefined and infinite ones become ``None``.
        requires: Ids of the patches that lay below when it was made, in order.
        created: Time in UTC, ISO 8601.
        libraries: Versions it was made with.
        folder: Where it was read from; other files there go along when it is written elsewhere.
        id: First 12 hexadecimal digits of a hash over kind, requests, base and deltas: equal edits have equal ids on every machine.

    Raises:
        ValueError: If it touches a tensor that its base does not name, or a field is not plain data.
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
            raise ValueError(f"a patch may only touch tensors of its base, which has no {unnamed[0]!r} ({len(unnamed)} such tensors)")
        if not set(self.figures) <= {"before", "after"}:
            raise ValueError(f"figures are given as 'before' and 'after', got {sorted(self.figures)}")
        for name in ("requests", "settings", "figures", "requires"):
            object.__setattr__(self, name, plain(getattr(self, name), name))
        object.__setattr__(self, "id", self._content_hash())
        self.tensors()

    def _content_hash(self) -> str:
        asked = [{name: value for name, value in request.items() if name != "outcome"} for request in self.requests]
        state = hashlib.sha256(to_json([self.kind, asked, dict(self.base)]).encode())
        for name, delta in sorted(self.deltas.items()):
            for part in (delta.up, delta.down):
                if part is not None:
                    state.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
                    state.update(raw(part))
        return state.hexdigest()[:12]

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``deltas.safetensors`` holds: ``name`` of a dense delta, ``name.up`` and ``name.down`` of a low-rank one."""
        stored: dict[str, Tensor] = {}
        for name, delta in sorted(self.deltas.items()):
            parts = {name: delta.up} if delta.down is None else {f"{name}.up": delta.up, f"{name}.down": delta.down}
            if stored.keys() & parts.keys():
                raise ValueError(f"two deltas would both be stored as {sorted(stored.keys() & parts.keys())[0]!r}; give one of them densely")
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
        """Write the patch as a folder, which appears when it is whole, and return it.

        Raises:
            FileExistsError: If there is something already.
        """
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; a patch is never overwritten: give another folder")
        with replacing(folder) as building:
            if self.folder is None:
                building.mkdir()
            else:
                mirror(self.folder, building, without={MANIFEST, DELTAS})
            (building / MANIFEST).write_text(self.manifest(), encoding="utf-8")
            if self.deltas:
                save_file(self.tensors(), building / DELTAS)
        return folder

    @classmethod
    def read(cls, folder: Path) -> Patch:
        """Read a patch folder.

        Raises:
            FileNotFoundError: If it is none.
            ValueError: If a file of it is damaged, a link that leads outside, a named pipe or a device, or the two do not belong together; the
                message names the file.
        """
        if not is_patch(folder):
            raise FileNotFoundError(f"{folder} is no patch: it has no {MANIFEST}; give the folder that holds one")
        check_tree(folder)
        tensors = load_tensors(folder / DELTAS) if (folder / DELTAS).exists() else {}
        return cls.from_parts(_text(folder / MANIFEST), tensors, str(folder), folder)

    @classmethod
    def from_parts(cls, manifest: str, tensors: Mapping[str, Tensor], source: str, folder: Path | None = None) -> Patch:
        """Put a patch together from the contents of its two files.

        Args:
            manifest: Text of ``patch.json``.
            tensors: Contents of ``deltas.safetensors``.
            source: What a message calls the place they come from.
            folder: The folder they come from.

        Raises:
            ValueError: If the manifest is wrong, the tensors are others than it names, or its id is not that of the contents.
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
            raise ValueError(f"{source} says id {fields['id']}, but its contents have {patch.id}: a file of it was changed; get the patch anew")
        return patch


def is_patch(folder: Path) -> bool:
    """Say whether a folder is a patch."""
    return (folder / MANIFEST).is_file()


def read_patches(folder: Path) -> list[Patch]:
    """Read all patches that lie directly in a folder, the oldest first; an unfinished one, under a hidden name, is none."""
    found = [path for path in folder.iterdir() if is_patch(path) and not path.name.startswith(".")]
    return sorted(map(Patch.read, found), key=lambda patch: (patch.created, patch.id))


def _text(path: Path) -> str:
    with open_text(path) as file:
        return file.read()


def _deltas(forms: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    named = {key for name, form in forms.items() for key in _keys(name, form)}
    if named != tensors.keys():
        missing, extra = sorted(named - tensors.keys()), sorted(tensors.keys() - named)
        raise ValueError(f"its tensors are not those of the manifest: missing {missing[:3]}, unexpected {extra[:3]}")
    deltas = {}
    for name, form in forms.items():
        try:
            deltas[name] = Delta(*(tensors[key] for key in _keys(name, form)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if list(deltas[name].shape) != form.get("shape"):
            raise ValueError(f"{name} has shape {list(deltas[name].shape)}, the manifest says {form.get('shape')}")
    return deltas


def _keys(name: str, form: Mapping[str, Any]) -> list[str]:
    return [f"{name}.up", f"{name}.down"] if form.get("form") == "low_rank" else [name]
