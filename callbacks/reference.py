"""The frozen reference of preference optimisation, computed once and kept."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from malleable.callbacks.sweep import sweep
from malleable.datamodules.loader import PhasedLoader, RowView
from malleable.lightning_modules.functional.logps import answer_logps

log = logging.getLogger(__name__)


def reference_logps(trainer: Trainer, module: LightningModule, rows: Any, loader: PhasedLoader[Any], label: str) -> Tensor:
    """Summed log-probabilities of every answer of every row under the model as it stands, ``(rows, K)`` in nats."""
    return sweep(trainer, module, rows, loader.collate_fn, loader.batch_size, lambda batch: answer_logps(module.model, batch), label)


class ReferenceCache(Callback):
    """Put reference log-probabilities beside the training pairs before the first step.

    The reference is the model as it stands then. The values are written once, to a file keyed by the rows' ids and the model's weights; a run that is
    resumed reads them again, because its model has moved on.

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute or read the values and show them to the loader."""
        loader = phased_loader(trainer, self.loader, type(self).__name__)
        rows = loader.dataset
        ids = torch.tensor([rows[index]["sample_id"] for index in range(len(rows))])
        if self.path is None:
            self.path = str(self._folder(trainer) / f"reference-{self._key(ids, pl_module)}.safetensors")
            if not Path(self.path).is_file():
                values = reference_logps(trainer, pl_module, rows, loader, "reference log-probabilities")
                self._write(trainer, Path(self.path), ids, values)
        fields = [{"reference_logps": row} for row in self._read(ids).tolist()]
        loader.show(RowView(rows, range(len(rows)), fields), loader.row_tokens)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @staticmethod
    def _key(ids: Tensor, module: LightningModule) -> str:
        digest = hashlib.sha256(ids.numpy().tobytes())
        for name, parameter in module.named_parameters():
            digest.update(name.encode())
            if parameter.numel():
                digest.update(parameter.detach().double().sum().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _write(self, trainer: Trainer, path: Path, ids: Tensor, values: Tensor) -> None:
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".partial")
            save_file({"sample_id": ids, "reference_logps": values.contiguous()}, temporary)
            temporary.rename(path)
        trainer.strategy.barrier("reference log-probabilities")

    def _read(self, ids: Tensor) -> Tensor:
        assert self.path is not None
        if not Path(self.path).is_file():
            raise MisconfigurationException(
                f"the reference log-probabilities of this run are gone: {self.path} does not exist. The model has been trained since, so they cannot be "
                "computed again; put the file back or start a new run"
            )
        with safe_open(self.path, "pt") as file:
            stored, values = file.get_tensor("sample_id"), file.get_tensor("reference_logps")
        order = stored.argsort()
        places = torch.searchsorted(stored[order], ids).clamp_max(len(stored) - 1)
        if not torch.equal(stored[order][places], ids):
            raise MisconfigurationException(f"{self.path} belongs to other training rows; remove it or use the data it was made with")
        return values[order][places]


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
