"""Creation of run folders before a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from malleable.callbacks.restart import extend_max_steps, finish_epoch
from malleable.datamodules.files.atomic import recover_below
from malleable.datamodules.files.run_folders import run_versions
from malleable.interruption import raise_pending


@contextmanager
def claimed_folders(trainer: Trainer) -> Iterator[None]:
    """Create a new run folder ``version_N`` before the data of a run is prepared.

    The first process of the run creates the folder, and :class:`RunFolder` broadcasts its number to the other processes. The folder is removed at the
    end if it is empty, or if the run fails and has written its configuration only.

    Args:
        trainer: Trainer. The version of each of its loggers is set to N, unless the logger already has a version.
    """
    claimed = []
    if _is_first(trainer):
        claimed = _claim(trainer)
        for folder in claimed:
            recover_below(folder.parent)  # temporary files of killed runs
    try:
        yield
    except BaseException:
        for folder in claimed:
            _discard_configuration(folder)
        raise
    finally:
        for folder in claimed:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _discard_configuration(folder: Path) -> None:
    """Remove the configuration files of a failed run if it has written no other files."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    if all(re.fullmatch(r"(config_\w+|hparams)\.yaml", file.name) for file in files):
        for file in files:
            file.unlink(missing_ok=True)


class RunFolder(Callback):
    """Use the run folder of the first process in all processes, restore the monitored checkpoints of a resumed run, and end a run at a signal."""

    _limit: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Broadcast the version of the first process to the loggers of all processes."""
        raise_pending()
        for logger in trainer.loggers:
            if isinstance(logger, (CSVLogger, TensorBoardLogger)):
                logger._version = trainer.strategy.broadcast(logger._version)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish an epoch that was interrupted between its last step and its end."""
        raise_pending()
        finish_epoch(trainer)
        if self._limit is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._limit = self._limit, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the run if an earlier signal had no effect."""
        raise_pending()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """End the run if an earlier signal had no effect."""
        raise_pending()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """End the run if an earlier signal had no effect."""
        raise_pending()

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """End the run if an earlier signal had no effect."""
        raise_pending()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the scores of monitored checkpoints of the interrupted run.

        Lightning discards them if the run folder is a different one. The best checkpoint would then be the best since the interruption only.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._limit = extend_max_steps(trainer, checkpoint)
        if trainer.state.fn != TrainerFn.FITTING or not trainer.ckpt_path or "://" in str(trainer.ckpt_path):
            return
        folder = Path(trainer.ckpt_path).absolute().parent
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state and isinstance(callback, ModelCheckpoint) and state.get("dirpath") != callback.dirpath:
                checkpoint["callbacks"][callback.state_key] = {
                    **state,
                    **{key: _moved(state[key], folder) for key in ("best_model_path", "kth_best_model_path", "last_model_path") if state.get(key)},
                    "best_k_models": {_moved(path, folder): score for path, score in state.get("best_k_models", {}).items()},
                    "dirpath": callback.dirpath,
                }


def _moved(path: str, folder: Path) -> str:
    """Return the path of a checkpoint in the folder of the resumed checkpoint if it exists there, because a run folder may have been renamed."""
    moved = folder / Path(path).name
    return str(moved) if moved.exists() else path


def claim_version(root: Path) -> int:
    """Create the folder ``version_N`` in ``root`` and return N, which is larger than all existing numbers.

    Processes that call this function at the same time get different numbers, because a folder can be created only once.
    """
    root.mkdir(parents=True, exist_ok=True)
    version = max((number for number, _ in run_versions(root)), default=-1) + 1
    while True:
        try:
            (root / f"version_{version}").mkdir()
        except FileExistsError:
            version += 1
        else:
            return version


def _claim(trainer: Trainer) -> list[Path]:
    versions: dict[str, int] = {}
    for logger in trainer.loggers:
        if not isinstance(logger, (CSVLogger, TensorBoardLogger)) or logger._version is not None or "://" in logger.root_dir:
            continue
        root = str(logger.root_dir)
        if root not in versions:
            versions[root] = claim_version(Path(root))
        logger._version = versions[root]
    return [Path(root) / f"version_{version}" for root, version in versions.items()]


def _is_first(trainer: Trainer) -> bool:
    # On further nodes, the strategy has no correct global rank before the process group is initialised.
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    return environment is None or (environment.node_rank() == 0 and environment.local_rank() == 0)
