"""Checkpoints of language models: what is stored of the weights, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from malleable.lightning_modules.language.config import FINGERPRINT
from malleable.lightning_modules.patches.tensors import canonical_name

log = logging.getLogger(__name__)


def keep_trained(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave frozen weights out of a checkpoint, but for those that patches have changed.

    Args:
        model: The attribute ``model`` of the module whose checkpoint it is.
        checkpoint: Its ``state_dict`` is made anew; ``patches`` names what was changed.
    """
    # Both names of a head that is tied to the embeddings; what quantization puts beside frozen weights has no parameter's name.
    trains = {f"model.{name}": parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    state = checkpoint.get("state_dict")
    if all(trains.values()) or not state:
        return
    patched = (checkpoint.get("patches") or {}).get("originals", {})
    checkpoint["state_dict"] = {
        key: value
        for key, value in state.items()
        if trains.get(key, not key.startswith("model.")) or (key in trains and canonical_name(key, "model.") in patched)
    }


def refuse_misfit(module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str, name: str | None) -> None:
    """Refuse a checkpoint of another base model or other settings.

    Args:
        module: Its ``model`` is built.
        checkpoint: What is to be loaded.
        base_fingerprint: Of the module's frozen weights.
        name: Of its base model.

    Raises:
        MisconfigurationException: If it does not fit.
    """
    state = checkpoint.get("state_dict") or {}
    if not state:
        return
    stored_base = checkpoint.get("base_fingerprint")
    if stored_base is not None and not stored_base.startswith(FINGERPRINT):
        log.warning("the checkpoint is of an earlier version: its base model cannot be compared with %r", name)
    elif stored_base is not None and stored_base != base_fingerprint:
        raise MisconfigurationException(
            f"the checkpoint was trained on another base model than '{name}' (fingerprint {stored_base[:12]}, here {base_fingerprint[:12]}); "
            "give the base model it was trained on"
        )
    model: Any = module.model
    missing = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad and f"model.{name}" not in state]
    unexpected = sorted(set(state) - set(module.state_dict()))
    if missing or unexpected:
        raise MisconfigurationException(
            f"the checkpoint does not fit this module: missing {missing[:3]}, unexpected {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in all); build the module with the settings it was trained with"
        )
