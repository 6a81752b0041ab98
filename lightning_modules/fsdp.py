"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer states are sharded over ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 strategy of Lightning, with data parallelism over all devices of all machines.

    By default, ``ModelParallelStrategy`` uses tensor parallelism within a machine, which the modules do not support. Checkpoints are single files,
    which all commands and strategies can read.

    Args:
        save_distributed_checkpoint: Write a folder with one file for each rank instead of a single file. This is needed if the weights do not fit
            into the memory of one machine.
        process_group_backend: Backend of ``torch.distributed``; default: that of the device.
        timeout_s: Timeout of collective operations in seconds.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None, timeout_s: float = 1800.0) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )

    def setup_environment(self) -> None:
        """Initialise the process group, and use all processes for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def data_parallel_mesh(strategy: Any) -> DeviceMesh | None:
    """Return the mesh of devices over which weights are sharded; ``None`` with strategies other than FSDP2."""
    return strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None


def shard_decoder(model: Any, mesh: DeviceMesh) -> None:
    """Shard the weights of a Hugging Face decoder over ranks; each block gathers its weights when it runs.

    Args:
        model: The decoder, with or without PEFT. Every rank must have all weights.
        mesh: Mesh of the devices.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_sharding(module: LightningModule, strategy: Any) -> None:
    """Check that a module shards its weights if the strategy is FSDP2; otherwise its gradients would not be averaged over ranks.

    Raises:
        MisconfigurationException: If the strategy is FSDP2 and the module does not shard its weights.
    """
    if isinstance(strategy, ModelParallelStrategy) and not getattr(module, "shards_weights", False):
        raise MisconfigurationException(
            f"{type(module).__name__} cannot run with {type(strategy).__name__}: it does not shard its weights over ranks; "
            "use ddp (--config base/ddp.yaml)"
        )
