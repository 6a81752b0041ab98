"""Checkpoints of language models: selection of the stored weights, and checks of the base model and the tensors when a checkpoint is loaded.

The tokenizer, the prompt template and the items of a checkpoint must equal those of the data: see :mod:`malleable.datamodules.compatibility`, which
``BaseModule.on_load_checkpoint`` calls.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from malleable.lightning_modules.language.config import FINGERPRINT
from malleable.lightning_modules.patches.tensors import canonical_name

log = logging.getLogger(__name__)


def remove_frozen(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Remove frozen weights from a checkpoint, except weights that patches have changed.

    Args:
        model: Attribute ``model`` of the module.
        checkpoint: Checkpoint of the module; its ``state_dict`` is replaced. ``patches`` contains the patches.
    """
    # Includes both names of tied weights. Tensors that quantization stores with frozen weights are not parameters.
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


def check_fit(module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str, name: str | None) -> None:
    """Check that a checkpoint fits a module.

    Args:
        module: Module whose ``model`` is built.
        checkpoint: Checkpoint to load.
        base_fingerprint: Fingerprint of the frozen weights of the module.
        name: Name of its base model.

    Raises:
        MisconfigurationException: If the checkpoint has another base model or other tensors.
    """
    state = checkpoint.get("state_dict") or {}
    if not state:
        return
    stored_base = checkpoint.get("base_fingerprint")
    if stored_base is not None and not stored_base.startswith(FINGERPRINT):
        log.warning("the checkpoint was written by an earlier version: its base model cannot be compared with %r", name)
    elif stored_base is not None and stored_base != base_fingerprint:
        raise MisconfigurationException(
            f"the checkpoint was trained with another base model than '{name}' (fingerprint {stored_base[:12]}, here {base_fingerprint[:12]}); "
            "give the base model that it was trained with"
        )
    model: Any = module.model
    missing = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad and f"model.{name}" not in state]
    unexpected = sorted(set(state) - set(module.state_dict()))
    if missing or unexpected:
        raise MisconfigurationException(
            f"the checkpoint does not fit this module: missing {missing[:3]}, unexpected {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in total); build the module with the settings of the checkpoint"
        )
