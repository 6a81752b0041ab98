"""One name for a tensor, wherever it is stored: that of the bare Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# PEFT puts the model under `base_model.model` and, in memory but not in its files, names the adapter after each of its parts.
_WRAPPED = "base_model.model."
_WRAPPERS = {"base_layer", "default", "modules_to_save"}


def canonical_name(key: str, prefix: str = "") -> str:
    """Return the name that a tensor goes by in every container.

    A weight under an adapter has the name it has without one; an adapter's own has the name of PEFT's files, without
    ``base_model.model.``; of a layer that is trained as a whole beside its frozen original, the trained one has the layer's name.

    Args:
        key: Name in a state dictionary or file.
        prefix: Where the model lies in the module whose state it is, e.g. ``model.``
    """
    name = key.removeprefix(prefix)
    if not name.startswith(_WRAPPED):
        return name
    name = ".".join(part for part in name.removeprefix(_WRAPPED).split(".") if part not in _WRAPPERS)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def canonical_names(keys: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Return ``{canonical name: key}`` of the keys under ``prefix``: both ways of one mapping.

    Raises:
        ValueError: If two keys come to the same name.
    """
    names: dict[str, str] = {}
    for key in (key for key in keys if key.startswith(prefix)):
        name = canonical_name(key, prefix)
        if name in names:
            raise ValueError(f"the tensors {names[name]!r} and {key!r} would both be named {name!r}; keep one of them")
        names[name] = key
    return names


def untied(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return all names of each tensor in memory by the first of them: tied tensors share one entry."""
    first: dict[object, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.data_ptr() else name
        names.setdefault(first.setdefault(place, name), []).append(name)
    return names


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and stored buffers of a live model, bare or wrapped by PEFT, by canonical name; tied ones once.

    They are the model's own: writing into them changes it.
    """
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    tensors = {name: state[key] for name, key in canonical_names(state).items()}
    return {name: tensors[name] for name in untied(tensors)}
