"""Changes of a trained model as patches: made after the last step, saved, registered, never made twice."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.lightning_modules.frozen_ddp import leave_frozen_unwrapped
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.stack import PatchStack
from malleable.lightning_modules.patches.tensors import canonical_tensors

log = logging.getLogger(__name__)

SECTION = "patches"  # of a checkpoint, as in files that `malleable patch` has written
EDITED = "edited"


class PostFitEdit(Callback, ABC):
    """Changes weights after training, by a patch.

    After the last step the patch is made on the best weights (those that ``test`` would load), written as a folder of the run, and applied; a
    checkpoint ``edited.ckpt`` with the changed weights takes the place of the best one, so that ``trainer.test()`` measures it. Both hold the
    originals: ``malleable patch revert`` gives them back to the bit. A run that resumes from the edited checkpoint, trains no further and is asked
    the same is not edited again; asked something else, it lays a second patch on top. One that trains the edited weights makes them its own,
    and is edited anew at its end. Several such callbacks of a Trainer work one after the other, each on top of what the last one left.

    Any LightningModule will do that has a Hugging Face model as an attribute.

    Args:
        model: Name of that attribute.
        start: ``best`` weights by the run's checkpoint callback, or the ``last`` ones.

    Attributes:
        stack: The patches that the model has, those of other edits among them.
        applied: Ids of the patches made here, with a digest of what each was asked.
        replaced: The checkpoint that was the best one before the edited one took its place.
    """

    kind: ClassVar[str]
    """Kind of the patch."""

    def __init__(self, model: str = "model", start: Literal["best", "last"] = "best") -> None:
        self.model = model
        self.start = start
        self.stack = PatchStack()
        self.applied: dict[str, str] = {}
        self.replaced: str = ""

    @abstractmethod
    def make_patch(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Patch:
        """Return the patch without changing the model. Use :meth:`patch` to build it from its deltas.

        The model lies where it was trained. Every rank calls this method; the patch of the first rank is written and applied by all.
        """

    def asked(self, trainer: Trainer) -> Any:
        """What is asked of the edit, as plain data: asked the same, a resumed run is not edited again."""
        return None

    def patch(self, model: nn.Module, deltas: Mapping[str, Delta], **about: Any) -> Patch:
        """Put a patch for the model as it stands together.

        Args:
            model: The model, without the deltas.
            deltas: What is added, by canonical tensor name.
            **about: ``title``, ``requests``, ``settings``, ``figures`` of :class:`Patch`.
        """
        return Patch(kind=self.kind, deltas=deltas, base=self.stack.base(canonical_tensors(model)), requires=self.stack.ids, **about)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard weights, in every stage, and edits of two models in one run, before anything long begins."""
        leave_frozen_unwrapped(trainer.strategy)
        models = sorted({edit.model for edit in _edits(trainer)})
        if len(models) > 1:
            raise MisconfigurationException(f"the edits of a run must change one model, got model={' and model='.join(models)}; run `fit` for each")
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            command = getattr(stage, "value", stage)  # Lightning passes a member of an enumeration
            raise MisconfigurationException(
                f"{type(self).__name__} cannot run `{command}` with {type(trainer.strategy).__name__}: it needs whole weights on every rank; use one "
                "device or ddp (--config base/ddp.yaml). To edit a model that is trained with such a strategy, train it without this callback, "
                "then run `fit` with --trainer.max_steps 0 and one device or ddp from the consolidated checkpoint"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of patches whose tensors are now trained: what training makes of them can no longer be taken back."""
        trained = [name for name, tensor in canonical_tensors(self._model(pl_module)).items() if tensor.requires_grad]
        touched = sorted(set(trained) & set(self.stack.originals))
        if touched:
            log.warning(
                "training goes on from the patches %s: they become part of the weights, and can no longer be reverted", ", ".join(self.stack.ids)
            )
            self.stack, self.applied = PatchStack(), {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make, write and register."""
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        asked = _mark(self.asked(trainer))
        same = [patch.id for patch in self.stack.patches if self.applied.get(patch.id) == asked]
        if same:
            log.info("%s: patch %s is applied already and was asked the same; revert it to edit anew", type(self).__name__, same[0])
            self._write(trainer, next(patch for patch in self.stack.patches if patch.id == same[0]))
            return
        self._load_best(trainer, pl_module)
        model = self._model(pl_module)
        with _back_on(trainer.strategy.root_device, model):
            # One patch for all ranks: theirs may differ by rounding.
            patch: Patch = trainer.strategy.broadcast(self.make_patch(trainer, pl_module, model))
        tensors = canonical_tensors(model)
        change = self.stack.apply(patch, tensors, allow_conflicts=True)
        change.write_into(tensors)
        for edit in _edits(trainer):
            edit.stack = change.stack
        self.applied[patch.id] = asked
        folder = self._folder(trainer)
        if folder is None:
            log.warning("%s: no run folder, the patch %s is in memory only", type(self).__name__, patch.id)
            return
        self._write(trainer, patch)
        self._register(trainer, folder)
        log.info("%s: patch %s in %s", type(self).__name__, patch.id, folder / "patches" / patch.id)

    def _write(self, trainer: Trainer, patch: Patch) -> None:
        """Write the patch into the run's folder, also where the run that made it was killed and this one resumes it in a folder of its own."""
        folder = self._folder(trainer)
        if folder is not None and trainer.is_global_zero and not (folder / "patches" / patch.id).exists():
            patch.write(folder / "patches" / patch.id)

    def _load_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint: Any = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "")
        if self.start == "last" or not path or path == self.replaced:
            return
        if not trainer.strategy.reduce_boolean_decision(Path(path).is_file(), all=True):
            # All ranks or none: they must edit the same weights.
            log.warning("%s: the best checkpoint %s is not a file on every machine: the last weights are edited", type(self).__name__, path)
            return
        stored = _read(path, "edit the last weights with start='last', or keep such objects out of save_hyperparameters")
        pl_module.on_load_checkpoint(stored)
        pl_module.load_state_dict(stored["state_dict"], strict=pl_module.strict_loading)
        self.on_load_checkpoint(trainer, pl_module, stored)

    def _register(self, trainer: Trainer, folder: Path) -> None:
        """Save the edited weights whole or not at all, and let ``test`` find them."""
        checkpoint: Any = trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_path", "")
        self.replaced = best or self.replaced
        path = Path(getattr(checkpoint, "dirpath", None) or folder / "checkpoints") / f"{EDITED}.ckpt"
        if checkpoint is not None:
            # The edited checkpoint names itself the best one, too.
            checkpoint.best_model_path = str(path)
        try:
            # All ranks take part in saving; rank zero replaces the file.
            with atomic_write(path) if trainer.is_global_zero else nullcontext(path) as own:
                temporary = Path(trainer.strategy.broadcast(str(own)))
                trainer.save_checkpoint(temporary)
                if trainer.is_global_zero:
                    self._complete(temporary, trainer.lightning_module)
        except BaseException:
            if checkpoint is not None:
                checkpoint.best_model_path = best
            raise
        trainer.strategy.barrier("edited")

    def _complete(self, path: Path, pl_module: LightningModule) -> None:
        """Put what was changed into a checkpoint of a module that keeps only what it trains."""
        if not is_overridden("on_save_checkpoint", pl_module):
            return
        stored = _read(path, "keep what is no plain data out of its checkpoints")
        missing = {key: tensor for key, tensor in self._changed(pl_module).items() if key not in stored["state_dict"]}
        if missing:
            stored["state_dict"] |= {key: tensor.cpu() for key, tensor in missing.items()}
            torch.save(stored, path)

    def _changed(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Tensors that the patches touch, by their keys in the module's state."""
        keys = {id(value): key for key, value in pl_module.state_dict(keep_vars=True).items()}
        tensors = canonical_tensors(self._model(pl_module))
        return {keys[id(tensor)]: tensor.detach() for name, tensor in tensors.items() if name in self.stack.originals}

    @contextmanager
    def originals(self, model: nn.Module) -> Iterator[None]:
        """Put the weights before all patches in place, to the bit, and the patched ones back."""
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

    def _model(self, pl_module: LightningModule) -> nn.Module:
        model = getattr(pl_module, self.model, None)
        if not isinstance(model, nn.Module):
            raise MisconfigurationException(
                f"{type(self).__name__} edits {type(pl_module).__name__}.{self.model}, which is {type(model).__name__} and no module; "
                "name the attribute with model=..."
            )
        return model

    def _folder(self, trainer: Trainer) -> Path | None:
        folder = trainer.log_dir or trainer.default_root_dir
        return Path(folder) if folder else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the patches."""
        if self.stack.patches:
            checkpoint[SECTION] = self.stack.as_plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the patches of a checkpoint."""
        self.stack = PatchStack.from_plain(checkpoint.get(SECTION), "the checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Keep what was done."""
        return {"applied": dict(self.applied), "replaced": self.replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was done."""
        self.applied, self.replaced = dict(state_dict["applied"]), state_dict["replaced"]


def _edits(trainer: Trainer) -> list[PostFitEdit]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it, undeclared
    return [callback for callback in callbacks if isinstance(callback, PostFitEdit)]


def _mark(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read(path: str | Path, advice: str) -> dict[str, Any]:
    try:
        stored = read_plain(path, mmap=False)
    except ValueError as error:
        raise MisconfigurationException(f"{error}; {advice}") from error
    return stored


@contextmanager
def _back_on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Put a model where it was trained: at the end of a fit Lightning has moved it to the CPU."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
