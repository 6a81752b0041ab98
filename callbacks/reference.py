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
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from malleable.callbacks.row_pass import apply_to_rows, rows_per_pass
from malleable.callbacks.run_files import copy_to_run, run_folder
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.fetch import cache_folder
from malleable.datamodules.loading import PhasedLoader, RowView
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.compiled import compiled_passes
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.losses.preference_base import PreferenceLoss
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)


def reference_logps(trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], label: str) -> Tensor:
    """Compute the summed log-probability of each answer under the current model, ``(rows, K)`` in nats; 0 for missing answers."""
    shared_prompt = module.decoding.shared_prompt
    count = max((len(rows[index]["answers"]) for index in range(len(rows))), default=0)

    def compute(batch: Any) -> Tensor:
        with compiled_passes():
            values = answer_logps(module.model, batch, shared_prompt=shared_prompt)
        return pad(values, (0, count - values.shape[1]))  # a batch may have fewer answers

    return apply_to_rows(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), compute, label)


class ReferenceCache(Callback):
    """Compute reference log-probabilities before the first training step, and add them to the rows of all splits that have rejected answers.

    The reference is the model at the start of the fit: the base model for a new adapter, the adapted model for an adapter that was trained before.
    The values are written once, with a checksum, to a file whose name depends on the rows, the model and the precision. Runs that differ only in the
    loss or the optimizer read the values of an earlier run from the cache folder. A resumed run copies the file of the interrupted run, because its
    model is no longer the reference. ``test`` and ``validate`` of a checkpoint read the file of its run.

    Without the values, evaluation measures the likelihood of answers, but no rewards. A loss without reference needs none: the callback does nothing.

    Args:
        dirpath: Folder of the file; default: the run folder.
        loader: Training loader; needed only without a data module of this package.
        reuse: Read the values of earlier runs from the folder ``references`` of the cache folder (``$MALLEABLE_CACHE``), and store them there.
    """

    def __init__(self, dirpath: str | None = None, loader: PhasedLoader[Any] | None = None, reuse: bool = True) -> None:
        self.dirpath = dirpath
        self.loader = loader
        self.reuse = reuse
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
        """Compute or read the values, and add them to the rows of the loaders."""
        module = cast("LanguageModel", pl_module)
        if not _needs_reference(module):
            rank_zero_info(f"{type(self).__name__}: the loss {type(getattr(module, 'loss', None)).__name__} needs no reference; nothing is computed")
            return
        loaders = {"train": phased_loader(trainer, self.loader, type(self).__name__)} | _evaluation_loaders(trainer)
        keys = {split: row_keys(loader.dataset) for split, loader in loaders.items()}
        together = torch.cat(list(keys.values()))
        folder = Path(self.dirpath) if self.dirpath else run_folder(trainer)
        resumed = self.name is not None
        if self.name is None:
            self.name = f"reference-{self._fingerprint(trainer, module, together)}.safetensors"
        path = folder / self.name
        if resumed:
            copy_to_run(trainer, folder, self.name)
        elif isinstance(loss := getattr(module, "loss", None), PreferenceLoss):
            loss.reset()  # its statistics belong to the previous reference
        if not resumed and not trainer.strategy.broadcast(trainer.is_global_zero and self._is_available(path)):
            parts = [
                reference_logps(trainer, module, loaders[split].dataset, loaders["train"], f"reference log-probabilities of {split} rows")
                for split in loaders
            ]
            width = max(values.shape[1] for values in parts)
            self._write(trainer, path, together, torch.cat([pad(values, (0, width - values.shape[1])) for values in parts]))
        for split, loader in loaders.items():
            _add_to_rows(loader, self._read(path, keys[split]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add stored values to the rows of ``validate``."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.VALIDATING:
            self._restore(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add stored values to the rows of ``test``."""
        self._restore(trainer, pl_module, "test")

    def _restore(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        """Add the values of the run of the checkpoint to the rows of a split that have none, if there are any."""
        loader = _evaluation_loaders(trainer).get(split)
        if loader is None or not _needs_reference(module) or "reference_logps" in loader.dataset[0]:
            return
        keys = row_keys(loader.dataset)
        folders = [Path(self.dirpath) if self.dirpath else run_folder(trainer)]
        if trainer.ckpt_path and "://" not in str(trainer.ckpt_path):
            folders = [*Path(trainer.ckpt_path).absolute().parents[:2], *folders]
        found: dict[str, Tensor] = {}
        for path in (path for folder in folders for path in sorted(folder.glob("reference-*.safetensors"))):
            try:
                found.setdefault(path.name, self._read(path, keys))
            except MisconfigurationException as error:
                log.warning("%s", error)
        if self.name in found:
            found = {self.name: found[self.name]}
        if len(found) > 1:
            raise MisconfigurationException(
                f"the folders {', '.join(map(str, dict.fromkeys(folders)))} have reference log-probabilities of several models for the {split} rows: "
                f"{', '.join(found)}; keep only the file of the run that is tested"
            )
        for values in found.values():
            _add_to_rows(loader, values)
        if not found:
            log.warning("no reference log-probabilities of the %s rows: the likelihood of answers is measured, but no rewards", split)

    def _is_available(self, path: Path) -> bool:
        """Return whether the file exists, after copying it from the cache folder if it is there."""
        if path.is_file() and self._is_intact(path):
            return True
        stored = cache_folder() / "references" / path.name
        if not (self.reuse and stored.is_file() and self._is_intact(stored)):
            return False
        with atomic_write(path) as temporary:
            shutil.copyfile(stored, temporary)
        log.info("reference log-probabilities: those of an earlier run, %s", stored)
        return True

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
        parts = [_local_values(parameter) for parameter in module.parameters()]
        sums = [part.sum(dtype=torch.float64) for part in parts] + [_norm(part) for part in parts]
        weights = trainer.strategy.reduce(torch.stack(sums), reduce_op="mean").cpu()
        # The values also depend on settings that do not change the weights, such as the number of heads, and on the precision.
        own = cast("LanguageModel", module)
        attention = getattr(getattr(own.model, "config", None), "_attn_implementation", None)
        kernels = [attention, own.decoding.shared_prompt, torch.get_float32_matmul_precision(), trainer.strategy.root_device.type]
        settings = json.dumps([own.settings(), str(trainer.precision), kernels], sort_keys=True, default=str)
        return hashlib.sha256(keys.numpy().tobytes() + weights.numpy().tobytes() + settings.encode()).hexdigest()[:16]

    def _write(self, trainer: Trainer, path: Path, keys: Tensor, values: Tensor) -> None:
        if trainer.is_global_zero:
            with atomic_write(path) as temporary:
                save_verified({"row": keys, "reference_logps": values.contiguous()}, temporary)
            if self.reuse:
                with atomic_write(cache_folder() / "references" / path.name) as temporary:
                    shutil.copyfile(path, temporary)
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


def _norm(values: Tensor) -> Tensor:
    """Return the norm of floating-point values, 0 for others, such as quantised weights; float64."""
    return torch.linalg.vector_norm(values).double() if values.is_floating_point() else torch.zeros((), dtype=torch.float64, device=values.device)


def _needs_reference(module: LightningModule) -> bool:
    loss = getattr(module, "loss", None)
    return not isinstance(loss, PreferenceLoss) or loss.needs_reference


def _evaluation_loaders(trainer: Trainer) -> dict[str, PhasedLoader[Any]]:
    """Return the loaders of validation and test whose rows have rejected answers and can be exchanged, by split."""
    source = getattr(trainer, "datamodule", None)
    found = {}
    for split in ("val", "test"):
        if source is None:
            loader = getattr(trainer, f"{split}_dataloaders", None)
        else:
            has_rows = len(getattr(source, f"{split}_dataset", None) or ()) > 0
            loader = getattr(source, f"{split}_dataloader")() if has_rows else None
        if isinstance(loader, PhasedLoader) and len(loader.dataset) and len(loader.dataset[0].get("answers", ())) > 1:
            found[split] = loader
    return found


def _add_to_rows(loader: PhasedLoader[Any], values: Tensor) -> None:
    """Add the reference log-probabilities ``(N, K)`` to the rows of a loader."""
    rows = loader.dataset
    fields = [{"reference_logps": row[: len(rows[index]["answers"])]} for index, row in enumerate(values.tolist())]
    loader.set_rows(RowView(rows, range(len(rows)), fields), loader.row_tokens)


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
