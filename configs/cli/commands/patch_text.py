"""Output of ``malleable patch``: tables in plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from malleable.datamodules.files.escape import for_terminal
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import Container

_BLOCK = 1 << 20
"""Number of values that are converted to float64 at once."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows in aligned columns; the last column has no fixed width."""
    cells = [[for_terminal(cell) for cell in row] for row in (head, *([_cell(value) for value in row] for row in rows))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells)


def listing(patches: Sequence[Patch]) -> str:
    """Return one line for each patch."""
    rows = [(place, p.id, p.kind, p.created, len(p.deltas), len(p.requests), p.title) for place, p in enumerate(patches, 1)]
    return table(["#", "id", "kind", "created", "tensors", "requests", "title"], rows)


def describe(patch: Patch, sizes: Mapping[str, float]) -> str:
    """Return a description of a patch.

    Args:
        patch: The patch.
        sizes: Norms of the original tensors, by name. If a norm is missing, the relative norm is omitted.
    """
    head = [("id", patch.id), ("kind", patch.kind), ("title", patch.title), ("created", patch.created)]
    head += [("requires", ", ".join(patch.requires)), ("base", f"{len(patch.base)} tensors")]
    parts = ["".join(f"{name + ':':<10}{value}".rstrip() + "\n" for name, value in head)]
    if patch.requests:
        parts.append("requests:\n" + "".join(f"  {_line(request)}\n" for request in patch.requests))
    if patch.settings:
        parts.append("settings:\n" + "".join(f"  {name}: {_cell(value)}\n" for name, value in patch.settings.items()))
    if any(patch.figures.values()):
        parts.append(table(["figure", "before", "after"], _figures(patch)))
    if patch.deltas:
        rows = [(name, delta.shape, delta.rank or "dense", delta.norm, _ratio(delta.norm, sizes.get(name))) for name, delta in patch.deltas.items()]
        parts.append(table(["tensor", "shape", "rank", "norm", "relative"], rows))
    return "\n".join(parts)


def patch_difference(first: Patch, second: Patch) -> str:
    """Return the requests that only one of two patches has, and a comparison of their deltas."""
    if first.id == second.id:
        return f"the same patch, {first.id}\n"
    lines = []
    for own, other in ((first, second), (second, first)):
        theirs = {_line(request) for request in other.requests}
        lines += [f"only in {own.id}: {line}\n" for line in map(_line, own.requests) if line not in theirs]
    rows = []
    for name in sorted(first.deltas.keys() | second.deltas.keys()):
        one, two = first.deltas.get(name), second.deltas.get(name)
        cosine = one.cosine(two) if one and two and one.shape == two.shape else None
        rows.append((name, one.norm if one else None, two.norm if two else None, cosine))
    return "".join(lines) + table(["tensor", f"norm in {first.id}", f"norm in {second.id}", "cosine"], rows)


def difference(first: Container, second: Container) -> str:
    """Return the tensors in which two targets differ, and the patches of both targets. One tensor of each target is read at a time."""
    rows: list[tuple[Any, ...]] = []
    both = [name for name in first.tensors if name in second.tensors]
    for name in both:
        row = _tensor_difference(first.tensors[name], second.tensors[name])
        if row is not None:
            rows.append((name, *row))
    lines = [f"{len(rows)} of {len(both)} common tensors differ\n"]
    if rows:
        lines.append(table(["tensor", "relative", "max abs"], rows))
    for own, other in ((first, second), (second, first)):
        alone = [name for name in own.tensors if name not in other.tensors]
        if alone:
            lines.append(f"only in {own.path} ({len(alone)}): {', '.join(alone[:3])}{', ...' * (len(alone) > 3)}\n")
    lines += [f"patches of {side.path}: {', '.join(side.stack.ids) or 'none'}\n" for side in (first, second)]
    return "".join(lines)


def _tensor_difference(first: Tensor, second: Tensor) -> tuple[str, str] | None:
    """Return the relative Frobenius norm and the largest absolute value of the difference; ``None`` if the tensors are equal."""
    if first.shape != second.shape:
        return f"shape {tuple(first.shape)}", f"shape {tuple(second.shape)}"
    energy = size = largest = 0.0
    for one, two in zip(*(torch.split(tensor.reshape(-1), _BLOCK) for tensor in (first, second) if tensor.numel()), strict=True):
        change = two.double() - one.double()
        energy += float(change.square().sum())
        size += float(one.double().square().sum())
        largest = max(largest, float(change.abs().max()))
    return (_ratio(math.sqrt(energy), math.sqrt(size)), _cell(largest)) if energy else None


def _figures(patch: Patch) -> list[tuple[Any, ...]]:
    before, after = (patch.figures.get(when, {}) for when in ("before", "after"))
    return [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]


def _ratio(part: float, whole: float | None) -> str:
    return "-" if not whole else f"{part / whole:.3e}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else str(value) if isinstance(value, int | tuple) else _line(value)
