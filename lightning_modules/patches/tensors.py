"""Names and hashes of tensors, and safetensors files that contain them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from malleable.datamodules.files.user_files import check_file, reading

# PEFT prefixes names with `base_model.model` and, in memory but not in its files, appends the adapter's name to each part.
_WRAPPED = "base_model.model."
_WRAPPERS = {"base_layer", "default", "modules_to_save"}


def canonical_name(key: str, prefix: str = "") -> str:
    """Return the canonical name of a tensor: its name in the bare Hugging Face model.

    A base weight below an adapter keeps the name that it has without the adapter. A weight of the adapter has its name in PEFT files,
    without ``base_model.model.``. Of a layer in ``modules_to_save``, the trained copy has the name of the layer.

    Args:
        key: Key in a state dictionary or file.
        prefix: Prefix of the model in the state dictionary, e.g. ``model.``
    """
    name = key.removeprefix(prefix)
    if not name.startswith(_WRAPPED):
        return name
    name = ".".join(part for part in name.removeprefix(_WRAPPED).split(".") if part not in _WRAPPERS)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def canonical_names(keys: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Return ``{canonical name: key}`` of the keys that start with ``prefix``.

    Raises:
        ValueError: If two keys have the same canonical name.
    """
    names: dict[str, str] = {}
    for key in (key for key in keys if key.startswith(prefix)):
        name = canonical_name(key, prefix)
        if name in names:
            raise ValueError(f"the tensors {names[name]!r} and {key!r} would both be named {name!r}; keep one of them")
        names[name] = key
    return names


def group_tied(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Group names by tensor: ``{first name: all names}``, so that tied tensors share one entry."""
    first: dict[object, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.data_ptr() else name
        names.setdefault(first.setdefault(place, name), []).append(name)
    return names


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model, bare or wrapped by PEFT, by canonical name; tied ones once.

    The tensors are not copies: writing into them changes the model.
    """
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tensors = {name: state[key] for name, key in canonical_names(state).items()}
    return {name: tensors[name] for name in group_tied(tensors)}


_BLOCK = 1 << 20  # number of values that are converted at once


def hash_tensor(tensor: Tensor) -> str:
    """Return a hash of a tensor's shape and values, 16 hexadecimal digits.

    Values of float32 and narrower formats are converted to float32, so that a bfloat16 file and its float32 copy have the same hash.
    float64 and integers are not converted.
    """
    dtype = torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
    state = hashlib.blake2b(f"{dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    for block in torch.split(tensor.detach().reshape(-1), _BLOCK):
        state.update(tensor_bytes(block.to("cpu", dtype)))
    return state.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hash of every tensor. One tensor at a time is read from ``tensors``, which may be a lazy mapping.

    For a model in memory, pass the output of :func:`canonical_tensors`, in which tied tensors occur once.
    """
    return {name: hash_tensor(tensors[name]) for name in sorted(tensors)}


@dataclass(frozen=True)
class Comparison:
    """Difference between a model's fingerprint and the base fingerprint of a patch.

    Attributes:
        checked: Number of tensors that are in both fingerprints.
        differing: Names in both fingerprints whose shapes or values differ.
        missing: Names in the fingerprint of the patch only.
        unknown: Names in the fingerprint of the model only, whose values equal those of no tensor of the patch.
        copies: Names in the fingerprint of the model only, with the name of an equal tensor of the patch: a tied tensor that is stored twice.
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


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a file with ``safetensors.safe_open``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a regular file, is damaged, or does not have a tensor that is read.
    """
    check_file(file, "give a complete folder of weights, or a safetensors file")
    with reading(file, "a safetensors file"), safe_open(file, "pt") as stored:
        yield stored


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file; see :func:`open_tensors`."""
    with open_tensors(file) as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (not a mapping)


def write_changed(source: Path, target: Path, values: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file and replace the values of some tensors. Other tensors are not loaded.

    The header is kept, so that restoring the old values gives an identical file.

    Args:
        source: Safetensors file.
        target: Path of the copy.
        values: New values by key, with the shapes and dtypes of the old ones.
    """
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        for key, value in values.items():
            start, end = header[key]["data_offsets"]
            data = tensor_bytes(value)
            assert data.nbytes == end - start, f"{key} changes its size"
            file.seek(8 + header_size + start)
            file.write(data)
    shutil.copymode(source, target)
