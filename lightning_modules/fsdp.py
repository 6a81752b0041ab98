"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer states are divided among ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with data parallelism over all devices of all machines.

    ``ModelParallelStrategy`` divides tensors within a machine by default, which no module here supports. Checkpoints are single files, so that
    every command and every strategy reads them.

    Args:
        save_distributed_checkpoint: Write a folder with a file for each rank instead. Such a folder is needed where the weights do not fit into
            the memory of one machine.
        process_group_backend: Backend of ``torch.distributed``; default: that of the device.
        timeout_s: Timeout of collectives in seconds.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None, timeout_s: float = 1800.0) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )

    def setup_environment(self) -> None:
        """Start the processes' group, and use all of them for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def data_parallel_mesh(strategy: Any) -> DeviceMesh | None:
    """Return the devices among which weights are divided, ``None`` under strategies other than FSDP2."""
    return strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None


def shard_decoder(model: Any, mesh: DeviceMesh) -> None:
    """Divide the weights of a Hugging Face decoder among ranks: each block gathers its weights when it runs.

    Args:
        model: The decoder, wrapped by PEFT or not. Every rank has all weights at this moment.
        mesh: The ranks.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def refuse_unsharded(module: LightningModule, strategy: Any) -> None:
    """Refuse FSDP2 for a module that does not divide its weights: its gradients would not be averaged over ranks.

    Raises:
        MisconfigurationException: If the strategy is one of FSDP2 and no weight of the module is divided.
    """
    if isinstance(strategy, ModelParallelStrategy) and not getattr(module, "shards_weights", False):
        raise MisconfigurationException(
            f"{type(module).__name__} cannot run with {type(strategy).__name__}: its weights are not divided among ranks; "
            "use ddp (--config base/ddp.yaml)"
        )
