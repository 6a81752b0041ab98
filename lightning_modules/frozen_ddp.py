"""Data-parallel runs of modules without trainable parameters."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

log = logging.getLogger(__name__)


def leave_frozen_unwrapped(strategy: Any) -> None:
    """Let a ``DDPStrategy`` run ``fit`` with a module that has no trainable parameter.

    ``DistributedDataParallel`` refuses such a module. The module is not wrapped, because there are no gradients to reduce. Its weights and buffers
    are broadcast from the first rank, as the wrapper would do. Call this function before the strategy is set up, e.g. in the hook ``setup``. Other
    strategies are not changed.

    Args:
        strategy: The Trainer's strategy.
    """
    if not isinstance(strategy, DDPStrategy) or "configure_ddp" in vars(strategy):
        return
    wrap = strategy.configure_ddp

    def configure_ddp() -> None:
        module = strategy.lightning_module
        assert module is not None
        if any(parameter.requires_grad for parameter in module.parameters()):
            wrap()
            return
        log.info("%s has no trainable parameter: it is not wrapped in DistributedDataParallel", type(module).__name__)
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.detach(), 0)

    strategy.configure_ddp = configure_ddp  # type: ignore[method-assign]
