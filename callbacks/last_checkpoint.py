"""Checkpoint of the last epoch, or of the step at which a run was interrupted."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from malleable.datamodules.files.atomic import atomic_write

log = logging.getLogger(__name__)

REPEATED_S = 3.0
"""Time after a signal in which further signals to several processes count as repetitions, in seconds."""


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch and when a fit is interrupted.

    With ``ModelCheckpoint(monitor=..., save_last=...)``, ``last.ckpt`` is the last of the *monitored* checkpoints, which can be many epochs old. Use
    this callback in addition. If another checkpoint callback has already saved the same step, ``last.ckpt`` is a relative link to its file.

    SIGINT and SIGTERM end a fit after the current optimizer step. A checkpoint of this step is saved, and the log contains the command that resumes.
    A second signal, or a signal outside training steps, ends the fit immediately. SIGTERM ends validation, test and prediction immediately.

    With several processes, it is sufficient that one of them receives the signal, because they agree after every step. Between the last step of an
    epoch and its end, they end the fit after they have saved the checkpoint of the epoch. A second signal has an effect only if it comes at least 3
    seconds after the first one, because launchers repeat signals.

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
        self._received_at = 0.0
        self._in_epoch = False
        self._earlier: dict[int, Any] = {}
        self._installed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Store the signal handlers before Lightning replaces them."""
        super().setup(trainer, pl_module, stage)
        self._earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self._earlier[signal.SIGINT] == signal.SIG_IGN:  # a job in the background of a shell script
            self._earlier[signal.SIGINT] = signal.default_int_handler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        super().on_train_start(trainer, pl_module)
        self._received, self._in_epoch = None, False
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler of SIGTERM broadcasts a tensor while the processes may be in another collective operation.
            receive = partial(self._receive, trainer, os.getpid())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, receive)
            self._installed = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to defer signals to the end of a step. This hook is called last for checkpoint callbacks, after the hooks of other callbacks."""
        self._in_epoch = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to defer signals, also in an epoch that is resumed, in which Lightning skips ``on_train_epoch_start``."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._in_epoch = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save a checkpoint and end the run if a signal was received and the optimizer step is complete."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.is_last_batch and trainer.world_size == 1:
            self._in_epoch = False
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end_if_received(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint of the epoch, and end the run if a signal was received since its last step."""
        super().on_train_epoch_end(trainer, pl_module)
        self._in_epoch = False
        self._end_if_received(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers."""
        super().on_train_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation outside a fit at SIGTERM. Lightning would first finish the batch or hook."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a test at SIGTERM."""
        super().on_test_start(trainer, pl_module)
        self._restore()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a prediction at SIGTERM."""
        super().on_predict_start(trainer, pl_module)
        self._restore()

    def _receive(self, trainer: Trainer, process: int, number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return  # a worker of a data loader, which its main process ends
        alone = trainer.world_size == 1
        if self._received is not None:
            if not alone and time.monotonic() - self._received_at < REPEATED_S:
                return
        elif self._in_epoch and not (alone and trainer.validating):
            self._received, self._received_at = number, time.monotonic()
            log.warning("received %s: the run ends after this step; a second signal ends it immediately", signal.Signals(number).name)
            return
        self._release()
        if not alone and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        # If Python ignores the exception, e.g. in a destructor, the run ends after the next step.
        self._received = number
        if path := self._last_checkpoint_saved:
            text = f"interrupted; the last checkpoint is that of step {self._last_global_step_saved}; {self._advice(path)}"
        else:
            text = f"interrupted in epoch {trainer.current_epoch}; nothing was saved; {self._advice(trainer.ckpt_path)}"
        self._end(number, text)

    def _end_if_received(self, trainer: Trainer) -> None:
        """Save a checkpoint and end the run if any process has received a signal. All processes must call this method."""
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        number = self._received or signal.SIGTERM
        if getattr(trainer, "fast_dev_run", False):
            self._release()
            self._end(number, "interrupted; nothing was saved, because fast_dev_run is set")
        path = str(Path(self.dirpath or "") / f"last{self.FILE_EXTENSION}")
        if (self._last_checkpoint_saved, self._last_global_step_saved) != (path, trainer.global_step):
            self._save_checkpoint(trainer, path)
        if isinstance(processes := getattr(trainer.strategy.launcher, "procs", None), list):
            processes.clear()  # they end, too; otherwise, the observer of Lightning kills this process if they are first
        self._release()
        self._end(number, f"interrupted in epoch {trainer.current_epoch} after step {trainer.global_step}; {self._advice(path)}")

    def _advice(self, path: str | Path | None) -> str:
        """Return how to resume from a checkpoint, or how to start if there is none."""
        if path is None:
            return "to start again, call Trainer.fit" if self.command is None else f"to start again, run: {self.command}"
        shown = str(path)
        if Path(path).is_relative_to(Path.cwd()):
            shown = str(Path(path).relative_to(Path.cwd()))
        if self.command is None:
            return f"to resume, call Trainer.fit with ckpt_path={shown!r}"
        return f"to resume, run: {self.command} --ckpt_path {shlex.quote(shown)}"

    @staticmethod
    def _end(number: int, text: str) -> NoReturn:
        log.info(text)
        error: BaseException = KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException(128 + number)
        error.add_note(text)  # the command line reports an interruption without a note
        raise error

    def _release(self) -> None:
        if self._installed:
            self._restore()
        self._installed = False

    def _restore(self) -> None:
        """Restore the signal handlers of the time before the Trainer ran."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._earlier.items():
                signal.signal(number, handler)

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
        with ExitStack() as stack:
            building = None
            if trainer.is_global_zero and path.is_dir():
                # Sharded strategies write into the existing folder. A killed process would leave files of two steps.
                building = str(stack.enter_context(atomic_write(path)))
            super()._save_checkpoint(trainer, trainer.strategy.broadcast(building) or filepath)
            if building and Path(building).is_file():
                shutil.rmtree(path)  # of a run with another strategy
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier("last replaced")


def _link(target: Path, path: Path) -> None:
    """Replace ``path`` atomically by a relative link to ``target``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.link")
    for old in path.parent.glob(f".{path.name}.*.link"):  # from killed processes
        old.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    temporary.replace(path)
