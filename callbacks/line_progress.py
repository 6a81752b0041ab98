"""Progress output: a bar on terminals, and lines in log files and pipes.

Both read the training loss from the device only when they print it, not after every batch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

LOSS = "train_loss"


class LossProgressBar(TQDMProgressBar):
    """Progress bar with the training loss, which is read from the device at most twice per second.

    Args:
        refresh_rate: Number of batches between updates.
        process_position: Line of the bar, if several bars are shown.
        leave: Whether to keep the bar of each epoch on the terminal.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._loss: dict[str, float] = {}
        self._read = -math.inf

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the metrics to show, with the training loss."""
        if not self._loss or time.monotonic() - self._read > 0.5:
            self._loss = training_loss(trainer)
            self._read = time.monotonic()
        return {**super().get_metrics(trainer, pl_module), **self._loss}


class LineProgress(ProgressBar):
    """Print one line for each tenth of a fit, a test or a prediction, instead of a progress bar.

    If the length of a fit is unknown (no ``max_epochs`` and no ``max_steps``), one line is printed for each epoch. The lines contain the training
    loss and the metrics that are logged with ``prog_bar=True``.

    Args:
        parts: Number of lines for a fit, a test or a prediction.

    Raises:
        ValueError: If ``parts`` is below 1.
    """

    def __init__(self, parts: int = 10) -> None:
        super().__init__()
        if parts < 1:
            raise ValueError(f"parts must be >= 1, got {parts}")
        self.parts = parts
        self._enabled = True
        self._printed = 0
        self._started = 0.0

    def disable(self) -> None:
        """Disable output."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the number of printed lines and the time."""
        self._begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print a line if a part of the fit ends at this batch."""
        if not trainer.is_last_batch:  # the last batch is shown after the validation of the epoch
            self._show_fit(trainer, pl_module, batch_idx + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line if a part of the fit ends with this epoch."""
        self._show_fit(trainer, pl_module, trainer.num_training_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the number of printed lines and the time."""
        self._begin()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Print a line if a part of the test ends at this batch."""
        self._show("test", trainer, (batch_idx + 1) / trainer.num_test_batches[dataloader_idx])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the number of printed lines and the time."""
        self._begin()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Print a line if a part of the prediction ends at this batch."""
        self._show("predict", trainer, (batch_idx + 1) / trainer.num_predict_batches[dataloader_idx])

    def _begin(self) -> None:
        self._printed = 0
        self._started = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the metrics to print, with the training loss."""
        return {**super().get_metrics(trainer, pl_module), **training_loss(trainer)}

    def _show_fit(self, trainer: Trainer, pl_module: LightningModule, batches: float) -> None:
        epoch = trainer.current_epoch
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        share = batches / trainer.num_training_batches if math.isfinite(trainer.num_training_batches) else 0.0

        def figures() -> str:
            found = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
            return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items())

        if steps > 0:
            self._show("fit", trainer, trainer.global_step / steps, lambda: f"epoch {epoch}, step {trainer.global_step} of {steps}, {figures()}")
        elif epochs > 0:
            self._show("fit", trainer, (epoch + share) / epochs, lambda: f"epoch {epoch} of {epochs}, {figures()}")
        elif share == 1:
            self._write(trainer, f"fit: epoch {epoch}, {figures()}")

    def _show(self, name: str, trainer: Trainer, share: float, text: Callable[[], str] = str) -> None:
        """Print a line if a new part has been reached; ``text`` is called only then, because it reads figures from the device."""
        part = int(share * self.parts + 1e-9)
        if part < self._printed:  # the next dataloader has started, or the fit was extended
            self._printed = part
        if part > self._printed:
            self._printed = part
            self._write(trainer, f"{name}: {100 * part // self.parts} %, {text()}")

    def _write(self, trainer: Trainer, line: str) -> None:
        if self._enabled and trainer.is_global_zero and not trainer.sanity_checking:
            sys.stdout.write(f"{line.rstrip(', ')} ({time.monotonic() - self._started:.0f} s)\n")
            sys.stdout.flush()


def training_loss(trainer: Trainer) -> dict[str, float]:
    """Read the training loss of the latest optimizer step from the device; empty if there is none."""
    loss = trainer.callback_metrics.get(LOSS)
    return {} if loss is None else {LOSS: loss.item()}
