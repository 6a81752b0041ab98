"""Counts what makes a program wait for its device, on machines without one."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_data import quiet_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations whose result, or the shape of it, the host must read from the device.
WAITING = {
    aten._local_scalar_dense,  # item, int, float, bool, indexing of a list, ranges up to a tensor
    aten.equal,
    aten.nonzero,  # where with one argument, too
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
}
HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


class Synchronisations(TorchDispatchMode):
    """Records each operation that waits for the device, with the line of this repository that called it.

        with Synchronisations() as waits:
            step()
        assert not waits.found, waits

    Run it on the device ``meta``, whose tensors hold no data: code then takes the paths of an accelerator, and what it would read from one
    is answered by a stand-in, so that all places are found in one run. On a CPU it works alike, but for ``tolist`` and ``numpy``.
    Backward passes started inside are covered, because their operations are dispatched too.

    Args:
        device: Count only what waits for tensors of this type of device. Default: all.

    Attributes:
        found: Operation and place of each wait, in order.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func.overloadpacket, func, args, kwargs) and self._concerns(func.overloadpacket, args):
            self.found.append(f"{func} at {_place()}")
            if any(value.is_meta for value in _tensors(args)):
                return _stand_in(func.overloadpacket, args, kwargs)
        return func(*args, **kwargs)

    def _concerns(self, packet, args) -> bool:
        copies = packet in (aten._to_copy, aten.copy_)
        return self.device is None or copies or any(value.device.type == self.device for value in _tensors(args))

    def __str__(self):
        return f"{len(self.found)} synchronisations:\n  " + "\n  ".join(self.found)


def _waits(packet, func, args, kwargs) -> bool:
    if packet in WAITING:
        return True
    if packet is aten.repeat_interleave:
        return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if packet is aten.index:
        return _boolean(args[1])
    if packet in (aten.index_put, aten.index_put_, aten._index_put_impl_):
        # A single value is written by `masked_fill`.
        return _boolean(args[1]) and args[2].numel() > 1
    if packet in (aten._to_copy, aten.copy_):
        return _between_devices(packet, args, kwargs)
    return False


def _boolean(indices) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _between_devices(packet, args, kwargs) -> bool:
    """A copy from or to the host that is not asked to overlap."""
    source = args[1] if packet is aten.copy_ else args[0]
    target = args[0].device if packet is aten.copy_ else kwargs.get("device") or source.device
    waits = not (args[2] if packet is aten.copy_ and len(args) > 2 else kwargs.get("non_blocking", False))
    return torch.device(target).type != source.device.type and waits


def _tensors(args):
    return [value for value in args if isinstance(value, Tensor)]


def _stand_in(packet, args, kwargs):
    """A result of plausible shape for what a meta tensor cannot give."""
    source = args[0]
    if packet is aten._local_scalar_dense:
        return torch.ones((), dtype=source.dtype).tolist()
    if packet is aten.equal:
        return True
    if packet is aten.nonzero:
        return source.new_empty((1, source.ndim), dtype=torch.long)
    if packet is aten._to_copy:
        device = kwargs.get("device") or source.device
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=device)
    if packet in (aten.copy_, aten.index_put, aten.index_put_):
        return source
    if packet is aten.index and _boolean(args[1][:1]) and len(args[1]) == 1:
        return source.new_empty((1, *source.shape[args[1][0].ndim :]))
    raise RuntimeError(f"{packet} waits for the device, and the count cannot go on behind it on meta tensors: {_place()}")


def _place() -> str:
    """The innermost line of this repository's code, or of whatever called."""
    frames = traceback.extract_stack()[:-3]
    own = [
        f for f in frames if Path(f.filename).resolve().is_relative_to(ROOT) and Path(f.filename).resolve() != HERE and "/.venv/" not in f.filename
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


class MetaAccelerator(CPUAccelerator):
    """Accelerator whose device is ``meta``."""

    def setup_device(self, device: torch.device) -> None:
        """Accept any device."""


class MetaStrategy(SingleDeviceStrategy):
    """Strategy on the device ``meta``."""

    def __init__(self) -> None:
        super().__init__("meta")

    def reduce(self, tensor: Any, *args: Any, **options: Any) -> Any:
        """Return the tensor; for the length of a loader, which Lightning reads before it trains, a stand-in."""
        length = isinstance(tensor, Tensor) and not tensor.is_floating_point()
        return torch.ones((), dtype=tensor.dtype) if length else tensor

    def teardown(self) -> None:
        """Leave the module where it is, and drop what was logged: meta tensors cannot be moved to the CPU."""
        trainer = self.lightning_module.trainer
        trainer.fit_loop.epoch_loop._results.clear()
        trainer._logger_connector.reset_metrics()


def meta_trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer on the device ``meta``, which logs nothing before its end and does not read what it logs."""
    settings = {
        "accelerator": MetaAccelerator(),
        "strategy": MetaStrategy(),
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "log_every_n_steps": 1000,
    }
    return quiet_trainer(folder, **settings, **options)


@contextmanager
def refuses_to_wait(device: torch.device) -> Iterator[None]:
    """Any synchronisation raises on CUDA; other devices have no such mode."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WatchedSteps(Callback):
    """Runs the batches of an epoch within a context, with what Lightning does between them.

    Args:
        context: Makes the context.
        first: Number of the first batch within the context.

    Attributes:
        steps: Number of batches within the context.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]], first: int = 0) -> None:
        self.context, self.first, self.steps = context, first, 0
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self.stack.enter_context(self.context())
        self.steps += batch_idx >= self.first

    def on_train_epoch_end(self, trainer, pl_module):
        self.stack.close()

    def on_exception(self, trainer, pl_module, exception):
        self.stack.close()
