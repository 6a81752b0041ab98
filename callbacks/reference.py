"""The frozen reference of preference optimisation, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from malleable.callbacks.run_files import run_folder, stored_copies
from malleable.callbacks.sweep import rows_per_pass, sweep
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.loading import PhasedLoader, RowView
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.compiled import compiled_passes
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)


def reference_logps(trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], label: str) -> Tensor:
    """Return the summed log-probability of each answer under the current model, ``(rows, K)`` in nats; 0 for missing answers."""
    shared_prompt = module.decoding.shared_prompt
    count = max((len(rows[index]["answers"]) for index in range(len(rows))), default=0)

    def compute(batch: Any) -> Tensor:
        with compiled_passes():
            values = answer_logps(module.model, batch, shared_prompt=shared_prompt)
        return torch.nn.functional.pad(values, (0, count - values.shape[1]))  # batches of rows with fewer answers are narrower

    return sweep(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), compute, label)


class ReferenceCache(Callback):
    """Put reference log-probabilities beside the training pairs before the first step.

    The reference is the model as it stands then. The values are written once, with a checksum, to a file keyed by the rows' text, the model and
    the precision; a run that is resumed reads them again, because its model has moved on. It finds the file beside the checkpoint and copies it.

    Args:
        dirpath: Folder of the file; default: the run folder.
        loader: The training loader, where there is no data module of ours.
    """

    def __init__(self, dirpath: str | None = None, loader: PhasedLoader[Any] | None = None) -> None:
        self.dirpath = dirpath
        self.loader = loader
        self.name: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Store the file's name."""
        return {"path": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the values of the interrupted run."""
        stored = state_dict["path"]
        self.name = stored and Path(stored).name  # earlier versions stored the path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let each fit have a reference of its own; one that is resumed learns afterwards where its values lie."""
        if stage == "fit":
            self.name = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or read the values and show them to the loader."""
        loader = phased_loader(trainer, self.loader, type(self).__name__)
        rows = loader.dataset
        keys = row_keys(rows)
        folder = Path(self.dirpath) if self.dirpath else run_folder(trainer)
        resumed = self.name is not None
        if self.name is None:
            self.name = f"reference-{self._fingerprint(trainer, pl_module, keys)}.safetensors"
        path = folder / self.name
        if resumed:
            self._adopt(trainer, stored_copies(trainer, folder, self.name)[0], path)
        elif not trainer.strategy.broadcast(path.is_file() and self._is_whole(path)):
            values = reference_logps(trainer, cast("LanguageModel", pl_module), rows, loader, "reference log-probabilities")
            self._write(trainer, path, keys, values)
        fields = [{"reference_logps": row} for row in self._read(path, keys).tolist()]
        loader.set_rows(RowView(rows, range(len(rows)), fields), loader.row_tokens)

    @staticmethod
    def _adopt(trainer: Trainer, stored: Path, path: Path) -> None:
        """Copy the file of the interrupted run to where the next checkpoints look for it."""
        if trainer.is_global_zero and stored.is_file() and stored.resolve() != path.resolve():
            with atomic_write(path) as temporary:
                shutil.copyfile(stored, temporary)
        trainer.strategy.barrier("reference log-probabilities")

    @staticmethod
    def _is_whole(path: Path) -> bool:
        try:
            load_verified(path)
        except ValueError as error:
            log.warning("%s: the reference log-probabilities are computed again", error)
            return False
        return True

    @staticmethod
    def _fingerprint(trainer: Trainer, module: LightningModule, keys: Tensor) -> str:
        """Identity of the rows and of the model, the same on all ranks, also where each holds a part of the weights."""
        sums = [_own_part(parameter).sum(dtype=torch.float64) for parameter in module.parameters()]
        weights = trainer.strategy.reduce(torch.stack(sums), reduce_op="mean").cpu()
        # Equal weights give other values under other settings, such as the number of heads, and in another precision.
        settings = json.dumps([cast("LanguageModel", module).settings(), str(trainer.precision)], sort_keys=True, default=str)
        return hashlib.sha256(keys.numpy().tobytes() + weights.numpy().tobytes() + settings.encode()).hexdigest()[:16]

    def _write(self, trainer: Trainer, path: Path, keys: Tensor, values: Tensor) -> None:
        if trainer.is_global_zero:
            with atomic_write(path) as temporary:
                save_verified({"row": keys, "reference_logps": values.contiguous()}, temporary)
        trainer.strategy.barrier("reference log-probabilities")

    @staticmethod
    def _read(path: Path, keys: Tensor) -> Tensor:
        if not path.is_file():
            raise MisconfigurationException(
                f"the reference log-probabilities of this run are gone: {path} does not exist. The model has been trained since, so they "
                "cannot be computed again; put the file back or start a new run"
            )
        try:
            tensors, _ = load_verified(path)
        except ValueError as error:
            raise MisconfigurationException(
                f"{error}. The model has been trained since, so the values cannot be computed again; put the original back or start a new run"
            ) from error
        stored, values = tensors.get("row", torch.zeros(0)), tensors.get("reference_logps", torch.zeros(0))
        if stored.dtype != torch.int64 or stored.ndim != 1 or not len(stored) or not values.is_floating_point() or len(values) != len(stored):
            raise MisconfigurationException(f"{path} holds no reference log-probabilities; put the original back or start a new run")
        order = stored.argsort()
        places = torch.searchsorted(stored[order], keys).clamp_max(len(stored) - 1)
        if not torch.equal(stored[order][places], keys):
            raise MisconfigurationException(f"{path} belongs to other training rows; remove it or use the data it was made with")
        chosen: Tensor = values[order][places]
        return chosen


def _own_part(parameter: Tensor) -> Tensor:
    """Return the values of a parameter that this rank holds."""
    # A parameter that DeepSpeed has partitioned is empty; this rank's part is beside it.
    own: Any = getattr(parameter, "ds_tensor", parameter).detach()
    part: Tensor = own.to_local() if isinstance(own, DTensor) else own
    return part


def row_keys(rows: Any) -> Tensor:
    """What tells a row from all others: its id, its prompt and its answers, hashed into ``(rows,)`` int64.

    The id alone will not do: rejected answers may be drawn anew for the same rows.
    """
    keys = []
    for index in range(len(rows)):
        row = rows[index]
        digest = hashlib.sha256(int(row["sample_id"]).to_bytes(8, "little", signed=True))
        for part in (row["prompt"], *row["answers"]):
            tokens = np.asarray(part, dtype=np.int64)
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        keys.append(int.from_bytes(digest.digest()[:8], "little", signed=True))
    return torch.tensor(keys)


def phased_loader(trainer: Trainer, loader: PhasedLoader[Any] | None, name: str) -> PhasedLoader[Any]:
    """The training loader whose rows a callback may exchange."""
    if loader is None:
        source = getattr(trainer, "datamodule", None)
        loader = source.train_dataloader() if source is not None else trainer.train_dataloader
    if not isinstance(loader, PhasedLoader):
        raise MisconfigurationException(
            f"{name} exchanges the training rows and needs a PhasedLoader, got {type(loader).__name__}: "
            f"wrap yours, `loader = PhasedLoader(DataLoader(...))`, and pass it to the Trainer and as {name}(loader=loader)"
        )
    return loader
