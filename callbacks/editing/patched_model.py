"""Base class of callbacks for models with patches: edits, and their evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from malleable.datamodules.editing.requests import EditRequest
from malleable.lightning_modules.frozen_ddp import leave_frozen_unwrapped
from malleable.lightning_modules.patches.stack import PatchStack
from malleable.lightning_modules.patches.tensors import canonical_tensors

log = logging.getLogger(__name__)

SECTION = "patches"
"""Entry of a checkpoint that contains the patches, as in files written by ``malleable patch``."""


class PatchedModel(Callback):
    """Base class of callbacks for a model with patches.

    The callback loads the patches of a checkpoint, and stores them in the checkpoints of the run.

    Args:
        model: Name of the LightningModule's attribute that contains the Hugging Face model.

    Attributes:
        stack: Patches of the model, those of other callbacks included.
        requests: Edit requests given to the callback; ``None`` without any.
    """

    def __init__(self, model: str = "model") -> None:
        self.model = model
        self.stack = PatchStack()
        self.requests: list[EditRequest] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and that all callbacks of the run are for one model.

        Raises:
            MisconfigurationException: If the strategy shards weights, or the callbacks name different models.
        """
        leave_frozen_unwrapped(trainer.strategy)
        models = sorted({callback.model for callback in patch_callbacks(trainer)})
        if len(models) > 1:
            raise MisconfigurationException(
                f"the edits and evaluations of a run must name the same model, got model={' and model='.join(models)}; run `fit` once for each model"
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            command = getattr(stage, "value", stage)  # Lightning passes a member of an enumeration
            raise MisconfigurationException(
                f"{type(self).__name__} cannot run `{command}` with {type(trainer.strategy).__name__}: it needs whole weights on every rank; use one "
                "device or ddp (--config base/ddp.yaml). To edit a model that is trained with such a strategy, train it without this callback, "
                "then run `fit` with --trainer.max_steps 0 and one device or ddp from the consolidated checkpoint"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the patches if one of their tensors is trained: after a training step, the original values no longer belong to the weights."""
        trained = {name for name, tensor in canonical_tensors(self.find_model(pl_module)).items() if tensor.requires_grad}
        if trained & set(self.stack.originals):
            if patch_callbacks(trainer)[0] is self:
                log.warning(
                    "training continues from the patches %s: they become part of the weights and cannot be reverted", ", ".join(self.stack.ids)
                )
            self.stack = PatchStack()

    @contextmanager
    def originals(self, model: nn.Module) -> Iterator[None]:
        """Restore the original weights, without any patch, for the duration of a ``with`` block."""
        tensors = canonical_tensors(model)
        patched = {name: tensors[name].detach().clone() for name in self.stack.originals}
        with torch.no_grad():
            for name, value in self.stack.originals.items():
                tensors[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in patched.items():
                    tensors[name].copy_(value)

    def find_model(self, pl_module: LightningModule) -> nn.Module:
        """Return the model.

        Raises:
            MisconfigurationException: If the attribute is missing or not a module.
        """
        model = getattr(pl_module, self.model, None)
        if not isinstance(model, nn.Module):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a Hugging Face model, but {type(pl_module).__name__}.{self.model} is a {type(model).__name__}; "
                "name the attribute with model=..."
            )
        return model

    def find_tokenizer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the attribute ``tokenizer`` of the module or of the data module.

        Raises:
            MisconfigurationException: If neither has one.
        """
        for owner in (pl_module, getattr(trainer, "datamodule", None)):
            tokenizer = getattr(owner, "tokenizer", None)
            if tokenizer is not None and not isinstance(tokenizer, str):
                return tokenizer
        raise MisconfigurationException(
            f"{type(self).__name__} needs the tokenizer of the model: give the module or the data module an attribute `tokenizer`"
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the patches."""
        if self.stack.patches:
            checkpoint[SECTION] = self.stack.as_plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the patches."""
        self.stack = PatchStack.from_plain(checkpoint.get(SECTION), "the checkpoint")


def patch_callbacks(trainer: Trainer) -> list[PatchedModel]:
    """Return the :class:`PatchedModel` callbacks of a Trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, not declared
    return [callback for callback in callbacks if isinstance(callback, PatchedModel)]
