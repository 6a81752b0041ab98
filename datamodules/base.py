"""Base class of all data modules: loaders by split, global batches, and gradient accumulation."""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule

from malleable.datamodules.batch import Batch
from malleable.datamodules.global_batches import step_layout
from malleable.datamodules.loading import PhasedLoader

log = logging.getLogger(__name__)


class BaseDataModule(LightningDataModule, ABC):
    """Base class of data modules with the datasets ``train_dataset``, ``val_dataset``, ``test_dataset`` and ``predict_dataset``.

    A subclass sets these attributes in :meth:`setup`. If a dataset has a method ``collate(rows)`` or ``make_batch(positions)``, this method creates
    the batches. Otherwise, the subclass must override :meth:`collate`. An optimizer step has ``global_batch_size`` rows on any number of devices;
    :meth:`setup` sets the gradient accumulation of the Trainer accordingly.

    Args:
        batch_size: Maximum number of rows of a training batch on one device.
        global_batch_size: Number of rows of an optimizer step over all devices. Default: ``batch_size`` times the number of devices.
        eval_batch_size: Number of rows of a batch in validation, test and prediction. Default: ``batch_size``.
        num_workers: Number of worker processes on each device.
        seed: Seed of the order of rows and of all random choices.

    Raises:
        ValueError: If a batch size is < 1.
    """

    drop_last: ClassVar[bool] = True
    """Whether training omits the rows that do not fill a global batch."""
    predict_options: ClassVar[str] = ""
    """Names of the arguments that set the data of prediction, for messages; empty if there are none."""
    train_dataset: Any = None
    val_dataset: Any = None
    test_dataset: Any = None
    predict_dataset: Any = None

    def __init__(
        self,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("global_batch_size", global_batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train_loader: PhasedLoader[Any] | None = None
        self._eval_loaders: dict[str, PhasedLoader[Any]] = {}

    def setup(self, stage: str) -> None:
        """Set the gradient accumulation of the Trainer; a subclass must call this method before it sets its datasets."""
        if stage == "fit" and self.trainer is not None:
            self._set_accumulation()

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Collate rows to a batch."""
        raise NotImplementedError(f"{type(self).__name__} cannot collate rows: add a method `collate` to the dataset, or override this method")

    def row_tokens(self) -> Sequence[int] | None:
        """Return the number of tokens of each training row that contribute to the loss; ``None``: losses are normalised by batch, not by step."""
        return None

    def train_dataloader(self) -> PhasedLoader[Any]:
        """Return the training loader. Every call returns the same object, so that callbacks can exchange its rows (``set_rows``)."""
        if self._train_loader is None:
            dataset = self._dataset("train")
            self._train_loader = PhasedLoader(
                dataset,
                self.batch_size,
                global_batch_size=self.global_batch_size,
                collate_fn=self.collate,
                drop_last=self.drop_last,
                row_tokens=self.row_tokens(),
                seed=self.seed,
                num_workers=self.num_workers,
                pin_memory=self._pins_memory,
            )
            if self._train_loader.num_steps == 0:
                raise ValueError(
                    f"{type(self).__name__}: {len(dataset)} training rows do not fill one optimizer step of "
                    f"{self._train_loader.rows_per_step} rows; reduce global_batch_size, or batch_size if global_batch_size is not set"
                )
        if self.trainer is not None and self.trainer.accumulate_grad_batches != self._train_loader.accumulation:
            if self.trainer.strategy.handles_gradient_accumulation:
                # DeepSpeed reads the accumulation before the first loader is created.
                raise MisconfigurationException(f"{type(self).__name__}.setup must call super().setup(stage) for this strategy")
            self._set_accumulation()
        return self._train_loader

    def val_dataloader(self) -> PhasedLoader[Any]:
        """Return the validation loader, in dataset order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> PhasedLoader[Any]:
        """Return the test loader, in dataset order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> PhasedLoader[Any]:
        """Return the prediction loader, in dataset order."""
        return self._eval_loader("predict")

    def teardown(self, stage: str) -> None:
        """Stop the worker processes."""
        for loader in (self._train_loader, *self._eval_loaders.values()):
            if loader is not None:
                loader.stop_workers()

    @property
    def _pins_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _eval_loader(self, split: str) -> PhasedLoader[Any]:
        """Return the loader of a split, cached until its dataset changes, so that worker processes are kept."""
        dataset, known = self._dataset(split), self._eval_loaders.get(split)
        if known is None or known.pool is not dataset or (known.max_batch_size, known.pin_memory) != (self.eval_batch_size, self._pins_memory):
            self._eval_loaders[split] = PhasedLoader(
                dataset,
                self.eval_batch_size,
                collate_fn=self.collate,
                shuffle=False,
                drop_last=False,
                num_workers=self.num_workers,
                pin_memory=self._pins_memory,
            )
        return self._eval_loaders[split]

    def _dataset(self, split: str) -> Any:
        dataset = getattr(self, f"{split}_dataset")
        if dataset is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no data for prediction: set {self.predict_options}"
                if split == "predict" and self.predict_options
                else f"{type(self).__name__} has no {split} data: `setup` did not set `{split}_dataset`"
            )
        if len(dataset) == 0:
            raise ValueError(f"{type(self).__name__}: the {split} split is empty; check the filters and the split settings")
        return dataset

    def _set_accumulation(self) -> None:
        trainer = self.trainer
        assert trainer is not None
        rows, batches = step_layout(self.batch_size, self.global_batch_size)
        if trainer.accumulate_grad_batches not in (1, batches):
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) contradicts global_batch_size="
                f"{self.global_batch_size}, which needs {batches}; omit accumulate_grad_batches"
            )
        trainer.accumulate_grad_batches = batches
        size = trainer.world_size
        log.info("an optimizer step has %s rows: %s rows a batch x %s devices x %s accumulated batches", rows * size * batches, rows, size, batches)
