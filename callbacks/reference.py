"""Cache of the reference log-probabilities of preference optimisation."""

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

from malleable.callbacks.row_pass import apply_to_rows, rows_per_pass
from malleable.callbacks.run_files import find_copies, run_folder
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.loading import PhasedLoader, RowView
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.compiled import compiled_passes
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)


def reference_logps(trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], label: str) -> Tensor:
    """Compute the summed log-probability of each answer under the current model, ``(rows, K)`` in nats; 0 for missing answers."""
    shared_prompt = module.decoding.shared_prompt
    count = max((len(rows[index]["answers"]) for index in range(len(rows))), default=0)

    def compute(batch: Any) -> Tensor:
        with compiled_passes():
            values = answer_logps(module.model, batch, shared_prompt=shared_prompt)
        return torch.nn.functional.pad(values, (0, count - values.shape[1]))  # a batch may have fewer answers

    return apply_to_rows(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), compute, label)


class ReferenceCache(Callback):
    """Compute reference log-probabilities before the first training step, and add them to the training rows.

    The reference is the model at the start of the fit. The values are written once, with a checksum, to a file whose name depends on the rows, the
    model and the precision. A resumed run copies the file of the interrupted run, because its model is no longer the reference.

    Args:
        dirpath: Folder of the file; default: the run folder.
        loader: Training loader; needed only without a data module of this package.
    """

    def __init__(self, dirpath: str | None = None, loader: PhasedLoader[Any] | None = None) -> None:
        self.dirpath = dirpath
        self.loader = loader
        self.name: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the file."""
        return {"path": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the name of the file of the interrupted run."""
        stored = state_dict["path"]
        self.name = stored and Path(stored).name  # earlier versions stored the path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the file name, because each fit has its own reference. A resumed fit restores the name after this hook."""
        if stage == "fit":
            self.name = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or read the values, and add them to the rows of the loader."""
        loader = phased_loader(trainer, self.loader, type(self).__name__)
        rows = loader.dataset
        keys = row_keys(rows)
        folder = Path(self.dirpath) if self.dirpath else run_folder(trainer)
        resumed = self.name is not None
        if self.name is None:
            self.name = f"reference-{self._fingerprint(trainer, pl_module, keys)}.safetensors"
        path = folder / self.name
        if resumed:
            self._copy_file(trainer, find_copies(trainer, folder, self.name)[0], path)
        elif not trainer.strategy.broadcast(path.is_file() and self._is_intact(path)):
            values = reference_logps(trainer, cast("LanguageModel", pl_module), rows, loader, "reference log-probabilities")
            self._write(trainer, path, keys, values)
        fields = [{"reference_logps": row} for row in self._read(path, keys).tolist()]
        loader.set_rows(RowView(rows, range(len(rows)), fields), loader.row_tokens)

    @staticmethod
    def _copy_file(trainer: Trainer, stored: Path, path: Path) -> None:
        """Copy the file of the interrupted run to the folder of this run."""
        if trainer.is_global_zero and stored.is_file() and stored.resolve() != path.resolve():
            with atomic_write(path) as temporary:
                shutil.copyfile(stored, temporary)
        trainer.strategy.barrier("reference log-probabilities")

    @staticmethod
    def _is_intact(path: Path) -> bool:
        try:
            load_verified(path)
        except ValueError as error:
            log.warning("%s: the reference log-probabilities are computed again", error)
            return False
        return True

    @staticmethod
    def _fingerprint(trainer: Trainer, module: LightningModule, keys: Tensor) -> str:
        """Return a checksum of rows, weights, settings and precision, which is the same on all ranks, also with sharded weights."""
        sums = [_local_values(parameter).sum(dtype=torch.float64) for parameter in module.parameters()]
        weights = trainer.strategy.reduce(torch.stack(sums), reduce_op="mean").cpu()
        # The values also depend on settings that do not change the weights, such as the number of heads, and on the precision.
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
                f"the reference log-probabilities of this run are missing: {path} does not exist. They cannot be computed again, because the model "
                "has been trained since; restore the file or start a new run"
            )
        try:
            tensors, _ = load_verified(path)
        except ValueError as error:
            raise MisconfigurationException(
                f"{error}. The values cannot be computed again, because the model has been trained since; restore the file or start a new run"
            ) from error
        stored, values = tensors.get("row", torch.zeros(0)), tensors.get("reference_logps", torch.zeros(0))
        if stored.dtype != torch.int64 or stored.ndim != 1 or not len(stored) or not values.is_floating_point() or len(values) != len(stored):
            raise MisconfigurationException(f"{path} contains no reference log-probabilities; restore the file or start a new run")
        order = stored.argsort()
        positions = torch.searchsorted(stored[order], keys).clamp_max(len(stored) - 1)
        if not torch.equal(stored[order][positions], keys):
            raise MisconfigurationException(f"{path} belongs to other training rows; remove the file, or use the data with which it was computed")
        selected: Tensor = values[order][positions]
        return selected


def _local_values(parameter: Tensor) -> Tensor:
    """Return the values of a parameter that are stored on this rank."""
    # A parameter that DeepSpeed has partitioned is empty. Its attribute `ds_tensor` has the values of this rank.
    own: Any = getattr(parameter, "ds_tensor", parameter).detach()
    part: Tensor = own.to_local() if isinstance(own, DTensor) else own
    return part


def row_keys(rows: Any) -> Tensor:
    """Compute a hash of id, prompt and answers for each row, ``(rows,)`` int64.

    The id is not sufficient, because new rejected answers can be drawn for the same row.
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
    """Return the training loader, and check that a callback can replace its rows."""
    if loader is None:
        source = getattr(trainer, "datamodule", None)
        loader = source.train_dataloader() if source is not None else trainer.train_dataloader
    if not isinstance(loader, PhasedLoader):
        raise MisconfigurationException(
            f"{name} replaces the training rows and needs a PhasedLoader, got {type(loader).__name__}; "
            f"wrap your loader, `loader = PhasedLoader(DataLoader(...))`, and pass it to the Trainer and to {name}(loader=loader)"
        )
    return loader
