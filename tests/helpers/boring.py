"""The smallest module and data module: one linear layer and random numbers, subclassed by tests to change one thing."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import Batch
from malleable.lightning_modules.base import BaseModule, LossOutput


class BoringBatch(Batch):
    """Features ``(B, 4)`` beside the ids."""

    features: Tensor


class BoringModule(BaseModule):
    """Pull the output of one linear layer towards ``goal``."""

    def __init__(
        self,
        goal: float = 1.0,
        width: int = 2,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.goal = goal
        self.width = width
        self.layer: nn.Module | None = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(4, self.width)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)

    def compute_loss(self, batch: BoringBatch) -> LossOutput:
        loss = (self(batch.features) - self.goal).square().mean()
        return LossOutput(loss, {"distance": loss.detach().sqrt()})

    def configure_metrics(self) -> dict[str, Metric]:
        return {"output": _Named(MeanMetric(), "mean_output")}

    def evaluate(self, batch: BoringBatch, metrics: dict[str, Metric]) -> None:
        metrics["output"].update(self(batch.features)[batch.sample_id >= 0])

    def predict_step(self, batch: BoringBatch, batch_idx: int) -> Tensor:
        return self(batch.features)


class Ragged(BoringModule):
    """A loss over parts of rows: row i has i parts, each of loss i."""

    def __init__(self, weighed: type | None = None) -> None:
        super().__init__()
        self.weighed = weighed

    def compute_loss(self, batch: BoringBatch) -> LossOutput:
        real = (batch.sample_id >= 0).float()
        parts = batch.sample_id * real
        if self.weighed is None:
            return LossOutput(parts.sum() / real.sum() + 0 * self.layer.bias.sum(), {})
        weight = parts.sum().long()
        return LossOutput((parts * parts).sum() / weight, {"parts": weight}, weight if self.weighed is torch.Tensor else int(weight))


class TrainingFree(BoringModule):
    """A module that needs no training before `test`."""

    trains = False


class BoringDataModule(BaseDataModule):
    """Random features, the same in every run."""

    def __init__(self, num_rows: int = 16, batch_size: int = 4, global_batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, global_batch_size=global_batch_size, seed=seed)
        self.num_rows = num_rows

    def setup(self, stage: str) -> None:
        super().setup(stage)
        features = torch.randn(self.num_rows, 4, generator=torch.Generator().manual_seed(self.seed))
        rows = list(enumerate(features))
        self.train_dataset = self.val_dataset = self.test_dataset = self.predict_dataset = rows

    def collate(self, rows: Sequence[Any]) -> BoringBatch:
        return BoringBatch(torch.tensor([index for index, _ in rows]), torch.stack([features for _, features in rows]))


class _Named(Metric):
    """Give a metric's value a name, as the base module expects."""

    def __init__(self, metric: Metric, name: str) -> None:
        super().__init__()
        self.metric = metric
        self.name = name

    def update(self, value: Tensor) -> None:
        self.metric.update(value)

    def compute(self) -> dict[str, Tensor]:
        return {self.name: self.metric.compute()}

    def reset(self) -> None:
        self.metric.reset()


class EditAfterFit(Callback):
    """Change the weights after the last step, and register the checkpoint that has the change."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            pl_module.layer.weight.zero_()
            pl_module.layer.bias.fill_(7.0)
        path = f"{trainer.log_dir}/checkpoints/edited.ckpt"
        trainer.save_checkpoint(path)
        trainer.checkpoint_callback.best_model_path = path
