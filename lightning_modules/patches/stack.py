"""The patches of one model: its patched weights are always the originals plus all deltas, rounded once.

Nothing is added or taken away step by step, so a patch can leave from anywhere in the stack, and the originals come back bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.patches.conflicts import Conflict, find_conflicts
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.tensors import Comparison, compare, digest, fingerprint

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Change(NamedTuple):
    """The outcome of applying or reverting; nothing is changed until it is written.

    Attributes:
        stack: The stack afterwards.
        tensors: New values of the tensors that change, on the CPU in the format of their originals.
        unchecked: Number of tensors of the patch's base that the target does not hold.
        conflicts: Where the patch meets others, if that was allowed.
    """

    stack: PatchStack
    tensors: dict[str, Tensor]
    unchecked: int = 0
    conflicts: Sequence[Conflict] = ()

    def write_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the new values into tensors of memory, such as a live model's: devices, formats and ties stay as they are.

        Args:
            tensors: Those that the change was made for, e.g. of
                :func:`~malleable.lightning_modules.patches.tensors.canonical_tensors`.
        """
        with torch.no_grad():
            for name, value in self.tensors.items():
                tensors[name].copy_(value)


@dataclass(frozen=True, eq=False)
class PatchStack:
    """The patches of a model, the first applied first, with what they hide.

    Attributes:
        patches: The patches.
        originals: Bit-exact copies of the tensors that they touch, by canonical name, as they are without any patch.
        digests: Digest of each of these tensors as patched, by which a later change is noticed.
    """

    patches: tuple[Patch, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the patches, in order: what a new patch made on this model ``requires``."""
        return tuple(patch.id for patch in self.patches)

    def base(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the fingerprint of the model as it is without any patch: the ``base`` of a new patch made on it.

        Args:
            tensors: The model as it stands, by canonical name; read one at a time.
        """
        untouched = {name: digest(tensors[name]) for name in tensors if name not in self.originals}
        return untouched | fingerprint(self.originals)

    def find(self, prefix: str) -> Patch:
        """Return the patch whose id begins with ``prefix``.

        Raises:
            ValueError: If there is none or more than one.
        """
        found = [patch for patch in self.patches if patch.id.startswith(prefix)]
        if len(found) != 1:
            problem = "more than one patch" if found else "no patch"
            raise ValueError(f"{problem} with id {prefix!r}; the target has {', '.join(self.ids) or 'none'}")
        return found[0]

    def apply(self, patch: Patch, tensors: Mapping[str, Tensor], *, allow_conflicts: bool = False, force: bool = False) -> Change:
        """Lay a patch on top.

        Args:
            patch: The patch.
            tensors: The model as it stands, by canonical name; a checkpoint's may lack what was not trained. Read one at a time.
            allow_conflicts: Apply also if a patch that this one was not made on top of touches the same tensors or requests.
            force: Apply also if tensors that the patch does not touch are not those it was made on, or patches that it requires
                are absent. Its deltas were then made for another model: their effect is no longer the measured one.

        Returns:
            The change; ``tensors`` are left alone.

        Raises:
            ValueError: If it is applied already, tensors that it touches are missing, quantised, of another shape or other
                values than it was made on, a tensor was changed beneath the stack, or for what the arguments allow.
        """
        if patch.id in self.ids:
            raise ValueError(f"patch {patch.id} is applied already; revert it first to apply it anew")
        _check_touched(patch, tensors)
        self._check_untouched_since(tensors, "export it --merged and make the patch on the result")
        found = compare(patch.base, self.base(tensors))
        _check_base(patch, found, force)
        absent = [id for id in patch.requires if id not in self.ids]
        if absent and not force:
            raise ValueError(f"patch {patch.id} was made on top of {', '.join(absent)}; apply these first, or force it")
        conflicts = find_conflicts(patch, self.patches)
        if conflicts and not allow_conflicts:
            report = "\n".join(map(str, conflicts))
            raise ValueError(f"patch {patch.id} meets others that it was not made on top of:\n{report}\nrevert those, or allow conflicts")
        new = {name: tensors[name].detach().to("cpu", copy=True) for name in patch.deltas.keys() - self.originals.keys()}
        change = self._change((*self.patches, patch), {**self.originals, **new}, patch.deltas)
        return change._replace(unchecked=len(found.missing), conflicts=conflicts)

    def revert(self, ids: Iterable[str], tensors: Mapping[str, Tensor], *, force: bool = False) -> Change:
        """Take patches away, from anywhere in the stack; the others stay as if these had never been there.

        Args:
            ids: Their ids, or beginnings of them.
            tensors: The model as it stands.
            force: Revert also if a remaining patch was made on top of one of them, or the patched tensors were changed since
                (by training, say: that change is lost).

        Returns:
            The change; ``tensors`` are left alone.

        Raises:
            ValueError: If an id is unknown or means several patches, or for what ``force`` allows.
        """
        gone = {self.find(prefix).id: self.find(prefix) for prefix in ids}
        left = tuple(patch for patch in self.patches if patch.id not in gone)
        held = [f"{patch.id} (on {', '.join(needed)})" for patch in left if (needed := [id for id in patch.requires if id in gone])]
        if held and not force:
            raise ValueError(f"other patches were made on top: {', '.join(held)}; revert those too, or force it")
        if not force:
            self._check_untouched_since(tensors, "reverting would lose that; force it to go back all the same")
        return self._change(left, self.originals, {name for patch in gone.values() for name in patch.deltas})

    def _change(self, patches: tuple[Patch, ...], originals: Mapping[str, Tensor], names: Collection[str]) -> Change:
        """Compute the tensors ``names`` under ``patches``, and the stack that goes with them."""
        touched = sorted({name for patch in patches for name in patch.deltas})
        tensors = {name: _patched(name, originals[name], patches) for name in sorted(names)}
        digests = {name: digest(tensors[name]) if name in tensors else self.digests[name] for name in touched}
        return Change(PatchStack(patches, {name: originals[name] for name in touched}, digests), tensors)

    def _check_untouched_since(self, tensors: Mapping[str, Tensor], advice: str) -> None:
        changed = [name for name, value in self.digests.items() if name not in tensors or digest(tensors[name]) != value]
        if changed:
            raise ValueError(f"{_few(changed)} changed after the patches {', '.join(self.ids)} were applied, by training or by hand; {advice}")

    def as_plain(self) -> dict[str, Any]:
        """Return the stack as the plain data that a checkpoint may hold."""
        patches = [{"manifest": patch.manifest(), "tensors": patch.tensors()} for patch in self.patches]
        return {"patches": patches, "originals": dict(self.originals), "digests": dict(self.digests)}

    @classmethod
    def from_plain(cls, section: Mapping[str, Any] | None, source: str) -> PatchStack:
        """Read what :meth:`as_plain` gave; ``None`` is an empty stack.

        Args:
            section: The plain data.
            source: What a message calls the place it comes from.

        Raises:
            ValueError: If it is damaged.
        """
        if section is None:
            return cls()
        try:
            parts = [(item["manifest"], item["tensors"]) for item in section["patches"]]
            originals, digests = section["originals"], section["digests"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the patches in {source} are damaged: no {error}") from error
        tensors = [*(own for _, own in parts), originals]
        if not all(isinstance(text, str) for text, _ in parts) or not all(map(_are_tensors, tensors)) or not isinstance(digests, dict):
            raise ValueError(f"the patches in {source} are damaged: an entry is of another type")
        patches = tuple(Patch.from_parts(manifest, tensors, f"{source}, patch {place}") for place, (manifest, tensors) in enumerate(parts))
        return cls.checked(patches, originals, digests, source)

    @classmethod
    def checked(cls, patches: tuple[Patch, ...], originals: Mapping[str, Tensor], digests: Mapping[str, str], source: str) -> PatchStack:
        """Put a stack together from stored parts.

        Raises:
            ValueError: If the originals are not those of the tensors that the patches touch.
        """
        touched = {name for patch in patches for name in patch.deltas}
        if not touched == originals.keys() == digests.keys():
            wrong = touched ^ originals.keys() or touched ^ digests.keys()
            raise ValueError(f"the patches in {source} are damaged: they and the stored originals differ in {_few(wrong)}")
        bases = {name: patch.base[name] for patch in patches for name in patch.deltas}
        damaged = [name for name, original in originals.items() if digest(original) != bases[name]]
        if damaged:
            raise ValueError(f"the patches in {source} are damaged: the stored originals of {_few(damaged)} are not what the patches were made on")
        return cls(patches, originals, digests)


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _patched(name: str, original: Tensor, patches: Iterable[Patch]) -> Tensor:
    """Add the deltas, in the order of their ids, so that a set of patches gives the same bits whatever the order it came in."""
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    deltas = [patch.deltas[name] for patch in sorted(patches, key=lambda patch: patch.id) if name in patch.deltas]
    if not deltas:
        return original
    total = deltas[0].dense().to(wide)
    for delta in deltas[1:]:
        total = total + delta.dense().to(wide)
    patched = (original.to(wide) + total).to(original.dtype)
    if not patched.isfinite().all():
        raise ValueError(f"{name} is not finite once patched: {original.dtype} holds no values that large, or the tensor itself is damaged")
    return patched


def _check_touched(patch: Patch, tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in patch.deltas if name not in tensors]
    if missing:
        if any(name.endswith(f".{own}") for name in missing for own in tensors):
            advice = "it names its tensors otherwise: load it and save it again with transformers"
        else:
            advice = "if it stores only what was trained, give the folder of the base model, or a checkpoint of all weights"
        raise ValueError(f"patch {patch.id} changes {_few(missing)}, which the target does not hold; {advice}")
    for name, delta in patch.deltas.items():
        tensor = tensors[name]
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is stored as {tensor.dtype}: quantised weights cannot be patched; patch the model before quantising it")
        if tuple(tensor.shape) != delta.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the patch {patch.id} is for {delta.shape}: it was made on another model")


def _check_base(patch: Patch, found: Comparison, force: bool) -> None:
    if not patch.base:
        return
    doubled = [name for name, same in found.copies.items() if same in patch.deltas]
    if doubled:
        raise ValueError(f"{_few(doubled)} in the target equals a tensor that the patch changes: tied, but stored twice; save the model again")
    touched = [name for name in found.differing if name in patch.deltas]
    # What a target that stores only trained weights may lack is the frozen model, not an adapter.
    others = [*found.differing, *found.unknown, *(name for name in found.missing if ".lora_" in name)]
    if not touched and (not others or force):
        return
    advice = f"and it changes {_few(touched)}: force does not help" if touched else "though none that it changes; force it to apply it all the same"
    raise ValueError(
        f"patch {patch.id} was made on other weights; tensors that differ: {len(others)} (of {len(patch.base)} in its base the target holds "
        f"{found.checked}), such as {_few(others)}, {advice}; give the weights it was made on, in their number format"
    )


def _few(names: Collection[str]) -> str:
    """Name up to three, and say how many there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
