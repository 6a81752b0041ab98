"""Patches of one model. Patched weights are always computed as the originals plus all deltas, rounded once.

Weights are never changed incrementally. Therefore any patch of the stack can be reverted, and reverting all restores the originals bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.patches.conflicts import Conflict, find_conflicts
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.tensors import Comparison, compare, fingerprint, hash_tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Change(NamedTuple):
    """Result of applying or reverting patches, before it is written.

    Attributes:
        stack: The new stack.
        tensors: New values of the changed tensors, on the CPU in the dtype of their originals.
        unchecked: Number of tensors of the patch's base that the target does not contain.
        conflicts: Conflicts with other patches, if these were allowed.
    """

    stack: PatchStack
    tensors: dict[str, Tensor]
    unchecked: int = 0
    conflicts: Sequence[Conflict] = ()

    def write_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the new values into tensors in memory, e.g. of a model; devices, dtypes and tied weights do not change.

        Args:
            tensors: Tensors that the change was computed for, e.g. from :func:`~malleable.lightning_modules.patches.tensors.canonical_tensors`.
        """
        with torch.no_grad():
            for name, value in self.tensors.items():
                tensors[name].copy_(value)


@dataclass(frozen=True, eq=False)
class PatchStack:
    """Patches of a model, in the order of application, with the original values of the tensors that they change.

    Attributes:
        patches: The patches.
        originals: Unpatched values of the changed tensors, by canonical name.
        hashes: Hashes of the patched values of these tensors, to detect later changes.
    """

    patches: tuple[Patch, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the patches, in order; a new patch of this model ``requires`` them."""
        return tuple(patch.id for patch in self.patches)

    def base(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the fingerprint of the model without its patches, the ``base`` of a new patch.

        Args:
            tensors: Current tensors of the model by canonical name; read one at a time.
        """
        unchanged = {name: hash_tensor(tensors[name]) for name in tensors if name not in self.originals}
        return unchanged | fingerprint(self.originals)

    def find(self, prefix: str) -> Patch:
        """Return the patch whose id starts with ``prefix``.

        Raises:
            ValueError: If there is no such patch, or more than one.
        """
        found = [patch for patch in self.patches if patch.id.startswith(prefix)]
        if len(found) != 1:
            problem = "more than one patch" if found else "no patch"
            raise ValueError(f"{problem} with id {prefix!r}; the target has {', '.join(self.ids) or 'none'}")
        return found[0]

    def apply(self, patch: Patch, tensors: Mapping[str, Tensor], *, allow_conflicts: bool = False, force: bool = False) -> Change:
        """Apply a patch.

        Args:
            patch: The patch.
            tensors: Current tensors of the model by canonical name, read one at a time. A checkpoint may contain trained tensors only.
            allow_conflicts: Apply the patch also if applied patches that it does not require change the same tensors or have contradicting requests.
            force: Apply the patch also if tensors that it does not change differ from those of the model that it was made for, or if patches that it
                requires are not applied. The effect of the patch then differs from the measured one.

        Returns:
            The change; ``tensors`` are not modified.

        Raises:
            ValueError: If the patch is applied already; if tensors that it changes are missing, quantised, or of another shape or other values than
                in its base; if patched tensors have changed since; or in the cases that ``allow_conflicts`` and ``force`` permit.
        """
        if patch.id in self.ids:
            raise ValueError(f"patch {patch.id} is applied already; to apply it again, revert it first")
        _check_changed_tensors(patch, tensors)
        self._check_unchanged(tensors, "export the weights with --merged, and make the patch for the result")
        found = compare(patch.base, self.base(tensors))
        _check_base(patch, found, force)
        absent = [id for id in patch.requires if id not in self.ids]
        if absent and not force:
            raise ValueError(f"patch {patch.id} requires {', '.join(absent)}, which are not applied; apply these first, or use force")
        conflicts = find_conflicts(patch, self.patches)
        if conflicts and not allow_conflicts:
            report = "\n".join(map(str, conflicts))
            raise ValueError(f"patch {patch.id} conflicts with patches that it does not require:\n{report}\nrevert these patches, or allow conflicts")
        new = {name: tensors[name].detach().to("cpu", copy=True) for name in patch.deltas.keys() - self.originals.keys()}
        change = self._change((*self.patches, patch), {**self.originals, **new}, patch.deltas)
        return change._replace(unchecked=len(found.missing), conflicts=conflicts)

    def revert(self, ids: Iterable[str], tensors: Mapping[str, Tensor], *, force: bool = False) -> Change:
        """Revert patches, from any position of the stack. The result is as if they had never been applied.

        Args:
            ids: Ids of the patches, or prefixes of ids.
            tensors: Current tensors of the model.
            force: Revert patches also if a remaining patch requires one of them, or if the patched tensors have changed since, e.g. by training. Such
                changes are lost.

        Returns:
            The change; ``tensors`` are not modified.

        Raises:
            ValueError: If an id is unknown or ambiguous, or in the cases that ``force`` permits.
        """
        reverted = {self.find(prefix).id: self.find(prefix) for prefix in ids}
        remaining = tuple(patch for patch in self.patches if patch.id not in reverted)
        dependent = [
            f"{patch.id} (requires {', '.join(required)})" for patch in remaining if (required := [id for id in patch.requires if id in reverted])
        ]
        if dependent and not force:
            raise ValueError(f"other patches require the patches to revert: {', '.join(dependent)}; revert those, too, or use force")
        if not force:
            self._check_unchanged(tensors, "reverting would discard this change; use force to revert nevertheless")
        return self._change(remaining, self.originals, {name for patch in reverted.values() for name in patch.deltas})

    def _change(self, patches: tuple[Patch, ...], originals: Mapping[str, Tensor], names: Collection[str]) -> Change:
        """Compute the tensors ``names`` with ``patches`` applied, and the new stack."""
        touched = sorted({name for patch in patches for name in patch.deltas})
        tensors = {name: _patched(name, originals[name], patches) for name in sorted(names)}
        hashes = {name: hash_tensor(tensors[name]) if name in tensors else self.hashes[name] for name in touched}
        return Change(PatchStack(patches, {name: originals[name] for name in touched}, hashes), tensors)

    def _check_unchanged(self, tensors: Mapping[str, Tensor], advice: str) -> None:
        changed = [name for name, value in self.hashes.items() if name not in tensors or hash_tensor(tensors[name]) != value]
        if changed:
            raise ValueError(f"{_join_names(changed)} changed after the patches {', '.join(self.ids)} were applied, e.g. by training; {advice}")

    def as_plain(self) -> dict[str, Any]:
        """Return the stack as plain data and tensors, for a checkpoint."""
        patches = [{"manifest": patch.manifest(), "tensors": patch.tensors()} for patch in self.patches]
        return {"patches": patches, "originals": dict(self.originals), "digests": dict(self.hashes)}

    @classmethod
    def from_plain(cls, section: Mapping[str, Any] | None, source: str) -> PatchStack:
        """Build a stack from the output of :meth:`as_plain`; ``None`` gives an empty stack.

        Args:
            section: Output of :meth:`as_plain`.
            source: Name of the source in error messages.

        Raises:
            ValueError: If the data are damaged.
        """
        if section is None:
            return cls()
        try:
            parts = [(item["manifest"], item["tensors"]) for item in section["patches"]]
            originals, hashes = section["originals"], section["digests"]
        except (KeyError, TypeError) as error:
            problem = f"field {error} is missing" if isinstance(error, KeyError) else "an entry has a wrong type"
            raise ValueError(f"the patches in {source} are damaged: {problem}; use another copy of the checkpoint") from error
        tensors = [*(own for _, own in parts), originals]
        if not all(isinstance(text, str) for text, _ in parts) or not all(map(_are_tensors, tensors)) or not isinstance(hashes, dict):
            raise ValueError(f"the patches in {source} are damaged: an entry has a wrong type; use another copy of the checkpoint")
        patches = tuple(Patch.from_parts(manifest, tensors, f"{source}, patch {place}") for place, (manifest, tensors) in enumerate(parts))
        return cls.checked(patches, originals, hashes, source)

    @classmethod
    def checked(cls, patches: tuple[Patch, ...], originals: Mapping[str, Tensor], hashes: Mapping[str, str], source: str) -> PatchStack:
        """Build a stack from stored parts.

        Raises:
            ValueError: If the originals do not match the patches.
        """
        touched = {name for patch in patches for name in patch.deltas}
        if not touched == originals.keys() == hashes.keys():
            wrong = touched ^ originals.keys() or touched ^ hashes.keys()
            raise ValueError(
                f"the patches in {source} are damaged: patches and stored originals do not have the same tensors: {_join_names(wrong)}; "
                "use another copy of the weights"
            )
        bases = {name: patch.base[name] for patch in patches for name in patch.deltas}
        damaged = [name for name, original in originals.items() if hash_tensor(original) != bases[name]]
        if damaged:
            raise ValueError(
                f"the patches in {source} are damaged: the stored originals of {_join_names(damaged)} differ from the base of the patches; "
                "use another copy of the weights"
            )
        return cls(patches, originals, hashes)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _patched(name: str, original: Tensor, patches: Iterable[Patch]) -> Tensor:
    """Add the deltas in the order of their ids, so that the result does not depend on the order in which patches were applied."""
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    deltas = [patch.deltas[name] for patch in sorted(patches, key=lambda patch: patch.id) if name in patch.deltas]
    if not deltas:
        return original
    total = deltas[0].dense().to(wide)
    for delta in deltas[1:]:
        total = total + delta.dense().to(wide)
    patched = (original.to(wide) + total).to(original.dtype)
    if not patched.isfinite().all():
        raise ValueError(
            f"{name} is not finite after patching: values exceed the range of {original.dtype}, or the tensor is damaged; use a wider dtype"
        )
    return patched


def _check_changed_tensors(patch: Patch, tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in patch.deltas if name not in tensors]
    if missing:
        if any(name.endswith(f".{own}") for name in missing for own in tensors):
            advice = "its tensors have other names: load it and save it again with transformers"
        else:
            advice = "if it contains trained weights only, give the folder of the base model, or a checkpoint of all weights"
        raise ValueError(f"patch {patch.id} changes {_join_names(missing)}, which the target does not contain; {advice}")
    for name, delta in patch.deltas.items():
        tensor = tensors[name]
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}, and quantised weights cannot be patched; patch the model before quantisation")
        if tuple(tensor.shape) != delta.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {delta.shape} in patch {patch.id}; give the model it was made for")


def _check_base(patch: Patch, found: Comparison, force: bool) -> None:
    if not patch.base:
        return
    doubled = [name for name, same in found.copies.items() if same in patch.deltas]
    if doubled:
        raise ValueError(
            f"{_join_names(doubled)} in the target equals a tensor that the patch changes: tied weights are stored twice; save the model again"
        )
    touched = [name for name in found.differing if name in patch.deltas]
    # A checkpoint of trained weights may lack tensors of the frozen model, but not of an adapter.
    others = [*found.differing, *found.unknown, *(name for name in found.missing if ".lora_" in name)]
    if not touched and (not others or force):
        return
    advice = (
        f"and it changes {_join_names(touched)}: force does not help" if touched else "but none that it changes; use force to apply it nevertheless"
    )
    raise ValueError(
        f"patch {patch.id} was made for other weights; tensors that differ: {len(others)} (the target contains {found.checked} of the "
        f"{len(patch.base)} tensors of its base), such as {_join_names(others)}, {advice}; give the weights it was made for, in their dtype"
    )


def _join_names(names: Collection[str]) -> str:
    """Return up to three names and the number of the others."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
