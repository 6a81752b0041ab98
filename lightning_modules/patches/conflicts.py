"""Conflicts between a patch and the patches of a stack that it does not require."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from malleable.lightning_modules.patches.patch import Patch


@dataclass(frozen=True)
class Overlap:
    """Comparison of two deltas of one tensor.

    Attributes:
        tensor: Canonical name of the tensor.
        cosine: Cosine similarity of the two deltas.
        share_in_rows: Share of the squared norm of the new delta in the row space of the other delta; ``None`` if the other delta is dense.
    """

    tensor: str
    cosine: float
    share_in_rows: float | None


@dataclass(frozen=True)
class Conflict:
    """Overlap of a new patch and a patch of the stack.

    Attributes:
        other: The patch of the stack.
        overlaps: Tensors that both patches change.
        contradictions: Pairs of requests, of the other and of the new patch, with the same prompt and subject but different targets.
    """

    other: Patch
    overlaps: Sequence[Overlap]
    contradictions: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]

    def __str__(self) -> str:
        lines = [f"conflict with {self.other.id} ({self.other.kind}{': ' if self.other.title else ''}{self.other.title}):"]
        for overlap in self.overlaps:
            share = "" if overlap.share_in_rows is None else f", {overlap.share_in_rows:.1%} of the new change is in its row space"
            lines.append(f"  {overlap.tensor}: cosine {overlap.cosine:+.3f}{share}")
        for theirs, ours in self.contradictions:
            lines.append(f"  {_question(ours)}: {_target(theirs)} in that patch, {_target(ours)} in the new one")
        return "\n".join(lines)


def find_conflicts(patch: Patch, stack: Iterable[Patch]) -> list[Conflict]:
    """Find conflicts of a new patch with applied patches.

    Args:
        patch: The new patch.
        stack: Applied patches; patches that ``patch`` requires are skipped.

    Returns:
        A conflict for each applied patch that changes a tensor of the new patch, or has a request with another target.
    """
    conflicts = []
    for other in stack:
        if other.id in patch.requires:
            continue
        common = [name for name in sorted(patch.deltas.keys() & other.deltas.keys()) if patch.deltas[name].shape == other.deltas[name].shape]
        overlaps = [_overlap(name, patch, other) for name in common]
        contradictions = _contradictions(patch, other)
        if overlaps or contradictions:
            conflicts.append(Conflict(other, overlaps, contradictions))
    return conflicts


def _overlap(name: str, patch: Patch, other: Patch) -> Overlap:
    ours, theirs = patch.deltas[name], other.deltas[name]
    return Overlap(name, ours.cosine(theirs), ours.share_in_rows_of(theirs))


def _contradictions(patch: Patch, other: Patch) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    by_question = {_question(request): request for request in other.requests}
    pairs = [(by_question[question], request) for request in patch.requests if (question := _question(request)) in by_question]
    return [(theirs, ours) for theirs, ours in pairs if _question(ours) != _NO_QUESTION and _target(theirs) != _target(ours)]


def _question(request: Mapping[str, Any]) -> str:
    return json.dumps([request.get("prompt"), request.get("subject")], ensure_ascii=False)


_NO_QUESTION = _question({})


def _target(request: Mapping[str, Any]) -> str:
    return json.dumps(request.get("target", request.get("target_new")), sort_keys=True, ensure_ascii=False)
