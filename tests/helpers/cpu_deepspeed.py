"""DeepSpeed without a GPU: Lightning's strategy refuses a CPU, the engine itself runs there over gloo."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported

import deepspeed
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

# Plain gloo: the shared-memory collectives would first be compiled, by every rank at once, for minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """The real strategy on CPU processes; takes the same arguments."""

    @property
    def parallel_devices(self) -> list[torch.device]:
        """CPU devices numbered by rank, which satisfies the strategy's check of device indices."""
        return [torch.device("cpu", index) for index in range(len(super().parallel_devices or []))]

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        DeepSpeedStrategy.parallel_devices.fset(self, devices)

    def setup_environment(self) -> None:
        """Skip the check for CUDA.

        With ``CPU_DEEPSPEED_PARTITION_ALL`` in the environment, small weights are partitioned as large ones are: by default, stage 3 leaves those
        below 100,000 values whole.
        """
        if self.zero_stage_3 and os.environ.get("CPU_DEEPSPEED_PARTITION_ALL"):
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        super(DeepSpeedStrategy, self).setup_environment()
