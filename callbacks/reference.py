"""The frozen reference of preference optimisation, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from malleable.callbacks.sweep import rows_per_pass, sweep
from malleable.datamodules.files import atomic_write
from malleable.datamodules.loader import PhasedLoader, RowView
from malleable.lightning_modules.compiled import compiled_passes
from malleable.lightning_modules.functional.logps import answer_logps
from malleable.lightning_modules.language_model import LanguageModel

log = logging.getLogger(__name__)


def reference_logps(trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], label: str) -> Tensor:
    """Summed log-probabilities of every answer of every row under the model as it stands, ``(rows, K)`` in nats."""
    shared_prompt = module.decoding.shared_prompt

    def compute(batch: Any) -> Tensor:
        with compiled_passes():
            return answer_logps(module.model, batch, shared_prompt=shared_prompt)

    return sweep(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), compute, label)


class ReferenceCache(Callback):
    """Put reference log-probabilities beside the training pairs before the first step.

    The reference is the model as it stands then. The values are written once, to a file keyed by the rows' text, the model and the precision;
    a run that is resumed reads them again, because its model has moved on.

    Args:
        dirpath: Folder of the file; default: the run folder.
        loader: The training loader, where there is no data module of ours.
    """

    def __init__(self, dirpath: str | None = None, loader: PhasedLoader[Any] | None = None) -> None:
        self.dirpath = dirpath
        self.loader = loader
        self.path: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Remember where the values lie."""
        return {"path": self.path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the values of the interrupted run."""
        self.path = state_dict["path"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let each fit have a reference of its own; one that is resumed learns afterwards where its values lie."""
        if stage == "fit":
            self.path = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or read the values and show them to the loader."""
        loader = phased_loader(trainer, self.loader, type(self).__name__)
        rows = loader.dataset
        keys = row_keys(rows)
        if self.path is None:
            path = self._folder(trainer) / f"reference-{self._fingerprint(trainer, pl_module, keys)}.safetensors"
            if not trainer.strategy.broadcast(path.is_file()):
                values = reference_logps(trainer, cast("LanguageModel", pl_module), rows, loader, "reference log-probabilities")
                self._write(trainer, path, keys, values)
            self.path = str(path)
        fields = [{"reference_logps": row} for row in self._read(keys).tolist()]
        loader.show(RowView(rows, range(len(rows)), fields), loader.row_tokens)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @staticmethod
    def _fingerprint(trainer: Trainer, module: LightningModule, keys: Tensor) -> str:
        """Identity of the rows and of the model, the same on all ranks, also where each holds a part of the weights."""
        # A parameter that DeepSpeed has partitioned is empty; this rank's part is beside it.
        sums = [getattr(parameter, "ds_tensor", parameter).detach().sum(dtype=torch.float64) for parameter in module.parameters()]
        weights = trainer.strategy.reduce(torch.stack(sums), reduce_op="mean").cpu()
        # Equal weights give other values under other settings, such as the number of heads, and in another precision.
        settings = json.dumps([cast("LanguageModel", module).settings(), str(trainer.precision)], sort_keys=True, default=str)
        return hashlib.sha256(keys.numpy().tobytes() + weights.numpy().tobytes() + settings.encode()).hexdigest()[:16]

    def _write(self, trainer: Trainer, path: Path, keys: Tensor, values: Tensor) -> None:
        if trainer.is_global_zero:
            with atomic_write(path) as temporary:
                save_file({"row": keys, "reference_logps": values.contiguous()}, temporary)
        trainer.strategy.barrier("reference log-probabilities")

    def _read(self, keys: Tensor) -> Tensor:
        assert self.path is not None
        if not Path(self.path).is_file():
            raise MisconfigurationException(
                f"the reference log-probabilities of this run are gone: {self.path} does not exist. The model has been trained since, so they "
                "cannot be computed again; put the file back or start a new run"
            )
        with safe_open(self.path, "pt") as file:
            stored, values = file.get_tensor("row"), file.get_tensor("reference_logps")
        order = stored.argsort()
        places = torch.searchsorted(stored[order], keys).clamp_max(len(stored) - 1)
        if not torch.equal(stored[order][places], keys):
            raise MisconfigurationException(f"{self.path} belongs to other training rows; remove it or use the data it was made with")
        chosen: Tensor = values[order][places]
        return chosen


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
