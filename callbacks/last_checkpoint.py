"""Checkpoint of the last epoch, or of the step at which a run was interrupted."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch and when a fit is interrupted.

    With ``ModelCheckpoint(monitor=..., save_last=...)``, ``last.ckpt`` is the last of the *monitored* checkpoints, which can be many epochs old. Use
    this callback in addition. If another checkpoint callback has already saved the same step, ``last.ckpt`` is a relative link to its file.

    In a single process, SIGINT and SIGTERM end a fit after the current optimizer step. A checkpoint of this step is saved, and the log contains the
    command that resumes. A second signal, or a signal outside training steps, ends the fit immediately. With several processes, and for SIGTERM under
    SLURM, Lightning handles the signals. SIGTERM ends validation, test and prediction immediately.

    Args:
        dirpath: Folder of the checkpoints; default: ``checkpoints`` in the run folder.
        every_n_epochs: Number of epochs between two checkpoints.

    Attributes:
        command: Command line of the run, for the message on how to resume; ``None`` if the run was not started from a command line.
    """

    command: str | None = None

    def __init__(self, dirpath: str | Path | None = None, every_n_epochs: int = 1) -> None:
        super().__init__(
            dirpath, filename="last", save_top_k=1, every_n_epochs=every_n_epochs, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self._received: int | None = None
        self._in_epoch = False
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            # Under SLURM, SIGTERM can come before the signal at which Lightning saves and requeues the job.
            for number in (signal.SIGINT,) if SLURMEnvironment.detect() else (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, partial(self._receive, trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to defer signals to the end of a step. This hook is called last for checkpoint callbacks, after the hooks of other callbacks."""
        self._in_epoch = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save a checkpoint and end the run if a signal was received and the optimizer step is complete."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._received is not None and complete:
            path = Path(self.dirpath or "") / f"last{self.FILE_EXTENSION}"
            if not getattr(trainer, "fast_dev_run", False):
                self._save_checkpoint(trainer, str(path))
                log.info("interrupted in epoch %d after step %d; %s", trainer.current_epoch, trainer.global_step, self._advice(path))
            self._end(self._received)
        if trainer.is_last_batch:
            self._in_epoch = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the default signal handlers."""
        super().on_train_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the default signal handlers."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation outside a fit at SIGTERM. Lightning would first finish the batch or hook."""
        if trainer.state.fn != TrainerFn.FITTING:
            _end_at_sigterm()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a test at SIGTERM."""
        _end_at_sigterm()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a prediction at SIGTERM."""
        _end_at_sigterm()

    def _receive(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        self._release()
        if not self._in_epoch or trainer.validating:
            if path := self._last_checkpoint_saved:
                log.info("interrupted; the last checkpoint is that of step %d; %s", self._last_global_step_saved, self._advice(path))
            self._end(number)
        self._received = number
        log.warning("received %s: the run ends after this step; a second signal ends it immediately", signal.Signals(number).name)

    def _advice(self, path: str | Path) -> str:
        """Return how to resume from a checkpoint."""
        shown = str(path)
        if Path(path).is_relative_to(Path.cwd()):
            shown = str(Path(path).relative_to(Path.cwd()))
        if self.command is None:
            return f"to resume, call Trainer.fit with ckpt_path={shown!r}"
        return f"to resume, run: {self.command} --ckpt_path {shlex.quote(shown)}"

    def _end(self, number: int) -> NoReturn:
        self._received = None
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException(128 + number)

    def _release(self) -> None:
        for number in self._handlers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self._handlers.clear()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        others = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint) and callback is not self)
        step = trainer.global_step
        same = [other._last_checkpoint_saved for other in others if other._last_checkpoint_saved and other._last_global_step_saved == step]
        path = Path(filepath)
        if same:
            if trainer.is_global_zero:
                _link(Path(same[0]), path)
            trainer.strategy.barrier("last")
            self._last_global_step_saved = step
            self._last_checkpoint_saved = filepath
            return
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()  # otherwise the target of the link, another checkpoint, would be overwritten
        trainer.strategy.barrier("last")
        super()._save_checkpoint(trainer, filepath)


def _end_at_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _link(target: Path, path: Path) -> None:
    """Replace ``path`` atomically by a relative link to ``target``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.link")
    for old in path.parent.glob(f".{path.name}.*.link"):  # from killed processes
        old.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    temporary.replace(path)
