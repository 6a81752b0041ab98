"""Which weights these are: a digest of every tensor, equal for every number format that holds the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 20  # values in memory at once, widened


def digest(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits that stand for a tensor's shape and values.

    Values of float32 and narrower formats are widened to float32, so that a bfloat16 file and its float32 copy agree; float64 and
    integers stand for themselves.
    """
    dtype = torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
    state = hashlib.blake2b(f"{dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    for block in torch.split(tensor.detach().reshape(-1), _BLOCK):
        state.update(raw(block.to("cpu", dtype)))
    return state.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of every tensor; one at a time is asked of ``tensors``, which may read them from a file.

    Of a live model, give what :func:`malleable.lightning_modules.patches.names.canonical_tensors` returns: tied tensors are there once.
    """
    return {name: digest(tensors[name]) for name in sorted(tensors)}


@dataclass(frozen=True)
class Comparison:
    """How a model's fingerprint compares with the one a patch was made on.

    Attributes:
        checked: Number of tensors that both have.
        differing: Those among them whose shape or values differ.
        missing: Names that only the patch knows.
        unknown: Names that only the model has.
        copies: Such names whose tensor equals one that the patch knows, with that one's name: a tied tensor that is stored twice.
    """

    checked: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    copies: Mapping[str, str]


def compare(base: Mapping[str, str], own: Mapping[str, str]) -> Comparison:
    """Compare the fingerprint of a model, ``own``, with the ``base`` of a patch."""
    names = {value: name for name, value in base.items()}
    beyond = sorted(own.keys() - base.keys())
    both = sorted(own.keys() & base.keys())
    return Comparison(
        checked=len(both),
        differing=tuple(name for name in both if own[name] != base[name]),
        missing=tuple(sorted(base.keys() - own.keys())),
        unknown=tuple(name for name in beyond if own[name] not in names),
        copies={name: names[own[name]] for name in beyond if own[name] in names},
    )
