"""Devices and time measurement of the benchmarks."""

from __future__ import annotations

import datetime
import time
from argparse import ArgumentParser
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_device_arguments(parser: ArgumentParser, *, dtype: bool = True) -> None:
    """Add ``--device``, and ``--dtype`` if ``dtype`` is set."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    if dtype:
        parser.add_argument("--dtype", default="float32", choices=DTYPES, help="number format of the weights on both sides")


def synchronize(device: str) -> None:
    """Wait until the device has finished. Call this function before each reading of the clock."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def describe(device: str) -> str:
    """Return the device, the version of torch and the date, to be recorded with measured figures."""
    kind = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{kind}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC).date()}"


class KernelShare(Callback):
    """Measure the share of the time of a training step in which kernels run on the device.

    The wall time is measured in a span of steps without the profiler. The time of kernels is measured in the following span with the profiler.

    Args:
        first: First training batch that is measured.
        steps: Number of batches in each of the two spans.
    """

    latest: ClassVar[dict[str, float]] = {}
    """Measurements of the latest run: seconds of a step and of its kernels, their ratio, and the number of kernels of a step."""

    def __init__(self, first: int = 20, steps: int = 20) -> None:
        self.first, self.steps = first, steps
        self._seen = 0
        self._start = self._wall = 0.0
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a span if this is its first batch."""
        if self._seen == self.first:
            synchronize(str(pl_module.device))
            self._start = time.perf_counter()
        elif self._seen == self.first + self.steps:
            synchronize(str(pl_module.device))
            self._wall = (time.perf_counter() - self._start) / self.steps
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._seen += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the span with the profiler after its last batch."""
        if self._seen != self.first + 2 * self.steps:
            return
        synchronize(str(pl_module.device))
        self._profiler.stop()
        kernels = [event for event in self._profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / self.steps / 1e6
        share = {"step_s": self._wall, "kernels_s": busy, "kernel_share": busy / self._wall, "launches": len(kernels) / self.steps}
        type(self).latest.update(share)
