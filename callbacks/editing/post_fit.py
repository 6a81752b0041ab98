"""Base class of edits after training. An edit is a patch that is made after the last step; the edited weights are saved as a checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from malleable.callbacks.editing.edit_evaluation import EditEvaluation
from malleable.callbacks.editing.patched_model import PatchedModel, patch_callbacks
from malleable.datamodules.editing.requests import EditRequest
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.plain_checkpoint import read_plain, saving
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.tensors import canonical_tensors

log = logging.getLogger(__name__)

EDITED = "edited"


class PostFitEdit(PatchedModel, ABC):
    """Base class of callbacks that change weights after training, by a patch.

    After the last step, the patch is made on the best weights, written into the run folder and applied. A checkpoint ``edited.ckpt`` with the
    changed weights replaces the best one, so that ``trainer.test()`` loads it. Patch and checkpoint contain the original values:
    ``malleable patch revert`` restores them to the bit. An :class:`~malleable.callbacks.editing.edit_evaluation.EditEvaluation` among the
    callbacks measures the model before and after.

    If a run resumes from the edited checkpoint without further training, the same edit is not made again; another edit adds a second patch. If
    the run trains the edited weights, the patches become part of the weights, and the model is edited again at the end. Several edits of a Trainer
    are applied in order, each on the result of the previous one.

    Args:
        model: Name of the LightningModule's attribute that contains the Hugging Face model.
        start: Weights to edit: ``best`` for those of the best checkpoint of the run, ``last`` for those after the last step.

    Attributes:
        stack: Patches of the model, those of other edits included.
        applied: Patches that this callback made: hash of :meth:`identity` by id of the patch.
        replaced: Path of the best checkpoint before the edited one replaced it.
        selected: Requests that the patch edits, output of :meth:`select_requests`.
    """

    kind: ClassVar[str]
    """Kind of the patches, e.g. ``alpha_edit``."""

    def __init__(self, model: str = "model", start: Literal["best", "last"] = "best") -> None:
        super().__init__(model)
        self.start = start
        self.applied: dict[str, str] = {}
        self.replaced: str = ""
        self.selected: list[EditRequest] = []

    @abstractmethod
    def make_patch(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Patch:
        """Return the patch, and leave the model unchanged. Use :meth:`patch` to build it from its deltas.

        The model is on the device of the training. Every rank calls this method; all ranks write and apply the patch of the first one.
        """

    def select_requests(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Sequence[EditRequest]:
        """Return the requests that :meth:`make_patch` will edit; called before it, on every rank. Default: none."""
        return ()

    def identity(self, trainer: Trainer) -> Any:
        """Return plain data that identifies the edit. A resumed run does not repeat an edit with equal data. Default: ``None``."""
        return None

    def patch(self, model: nn.Module, deltas: Mapping[str, Delta], **about: Any) -> Patch:
        """Build a patch for the model in its current state.

        Args:
            model: The model, without the deltas.
            deltas: Changes, by canonical tensor name.
            **about: ``title``, ``requests``, ``settings``, ``figures`` of :class:`Patch`.
        """
        return Patch(kind=self.kind, deltas=deltas, base=self.stack.base(canonical_tensors(model)), requires=self.stack.ids, **about)

    def find_evaluation(self, trainer: Trainer) -> EditEvaluation | None:
        """Return the callback that evaluates edits; ``None`` if the Trainer has none."""
        return next((callback for callback in patch_callbacks(trainer) if isinstance(callback, EditEvaluation)), None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the patches if one of their tensors is trained."""
        super().on_train_start(trainer, pl_module)
        if not self.stack.patches:
            self.applied = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the patch, evaluate it, write it, and register the edited checkpoint."""
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        identity = hashlib.sha256(json.dumps(self.identity(trainer), sort_keys=True).encode()).hexdigest()
        same = [patch for patch in self.stack.patches if self.applied.get(patch.id) == identity]
        if same:
            log.info("%s: patch %s of the same requests is applied already; revert it to edit again", type(self).__name__, same[0].id)
            self._write(trainer, same[0])
            return
        self._load_best(trainer, pl_module)
        patch = self._edit(trainer, pl_module)
        self.applied[patch.id] = identity
        folder = self._folder(trainer)
        if folder is None:
            log.warning("%s: there is no run folder; the patch %s exists in memory only", type(self).__name__, patch.id)
            return
        self._write(trainer, patch)
        self._register(trainer, folder)
        log.info("%s: wrote patch %s to %s", type(self).__name__, patch.id, folder / "patches" / patch.id)

    def _edit(self, trainer: Trainer, pl_module: LightningModule) -> Patch:
        """Make a patch and apply it. If the Trainer has an EditEvaluation, it evaluates the model before and after."""
        evaluation, model = self.find_evaluation(trainer), self.find_model(pl_module)
        with _on_device(trainer.strategy.root_device, model):
            self.selected = list(self.select_requests(trainer, pl_module, model))
            if evaluation is not None:
                evaluation.before_edit(trainer, pl_module, self.selected)
            # All ranks use the patch of rank zero: the patches of other ranks may differ by rounding.
            patch: Patch = trainer.strategy.broadcast(self.make_patch(trainer, pl_module, model))
            tensors = canonical_tensors(model)
            change = self.stack.apply(patch, tensors, allow_conflicts=True)
            change.write_into(tensors)
            if evaluation is not None:
                patch = evaluation.after_edit(trainer, pl_module, patch)
        stack = replace(change.stack, patches=(*self.stack.patches, patch))
        for callback in patch_callbacks(trainer):
            callback.stack = stack
        return patch

    def _write(self, trainer: Trainer, patch: Patch) -> None:
        """Write the patch into the run folder if it is not there; a killed run may resume in another folder."""
        folder = self._folder(trainer)
        if folder is not None and trainer.is_global_zero and not (folder / "patches" / patch.id).exists():
            patch.write(folder / "patches" / patch.id)

    def _load_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint: Any = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "")
        if self.start == "last" or not path or path == self.replaced:
            return
        if not trainer.strategy.reduce_boolean_decision(Path(path).is_file(), all=True):
            # Decided for all ranks together: they must edit the same weights.
            log.warning(
                "%s: the best checkpoint %s does not exist on every machine; the last weights are edited. To edit the best ones, use a shared folder",
                type(self).__name__,
                path,
            )
            return
        stored = _read(path, "edit the last weights with start='last', or exclude objects that are not plain data from save_hyperparameters")
        pl_module.on_load_checkpoint(stored)
        pl_module.load_state_dict(stored["state_dict"], strict=pl_module.strict_loading)
        for callback in patch_callbacks(trainer):
            callback.on_load_checkpoint(trainer, pl_module, stored)

    def _register(self, trainer: Trainer, folder: Path) -> None:
        """Save the edited checkpoint atomically, and make it the best one."""
        checkpoint: Any = trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_path", "")
        self.replaced = best or self.replaced
        path = Path(getattr(checkpoint, "dirpath", None) or folder / "checkpoints") / f"{EDITED}.ckpt"
        if checkpoint is not None:
            # Set before saving, because the edited checkpoint stores this path, too.
            checkpoint.best_model_path = str(path)
        try:
            # All ranks take part in saving; rank zero replaces the file.
            with atomic_write(path) if trainer.is_global_zero else nullcontext(path) as own:
                temporary = Path(trainer.strategy.broadcast(str(own)))
                trainer.save_checkpoint(temporary)
                if trainer.is_global_zero:
                    self._add_changed_tensors(temporary, path, trainer.lightning_module)
        except BaseException:
            if checkpoint is not None:
                checkpoint.best_model_path = best
            raise
        trainer.strategy.barrier("edited")

    def _add_changed_tensors(self, path: Path, target: Path, pl_module: LightningModule) -> None:
        """Add the changed tensors to the checkpoint of a module that stores trained tensors only; ``path`` will replace ``target``."""
        if not is_overridden("on_save_checkpoint", pl_module):
            return
        stored = _read(path, "store only plain data in its checkpoints")
        missing = {key: tensor for key, tensor in self._changed_tensors(pl_module).items() if key not in stored["state_dict"]}
        if missing:
            stored["state_dict"] |= {key: tensor.cpu() for key, tensor in missing.items()}
            with saving(target):
                torch.save(stored, path)

    def _changed_tensors(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the tensors that the patches change, by their keys in the state of the module."""
        keys = {id(value): key for key, value in pl_module.state_dict(keep_vars=True).items()}
        tensors = canonical_tensors(self.find_model(pl_module))
        return {keys[id(tensor)]: tensor.detach() for name, tensor in tensors.items() if name in self.stack.originals}

    def _folder(self, trainer: Trainer) -> Path | None:
        folder = trainer.log_dir or trainer.default_root_dir
        return Path(folder) if folder else None

    def state_dict(self) -> dict[str, Any]:
        """Return the patches made, and the checkpoint that was replaced."""
        return {"applied": dict(self.applied), "replaced": self.replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the patches made, and the checkpoint that was replaced."""
        self.applied, self.replaced = dict(state_dict["applied"]), state_dict["replaced"]


def _read(path: str | Path, advice: str) -> dict[str, Any]:
    try:
        stored = read_plain(path, mmap=False)
    except ValueError as error:
        raise MisconfigurationException(f"{error}; {advice}") from error
    return stored


@contextmanager
def _on_device(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Move a model to the device of the training: at the end of a fit, Lightning moves it to the CPU."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
