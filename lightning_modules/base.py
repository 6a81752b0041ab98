"""Base class of all modules: steps, logging, optimizer and learning-rate schedule."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import Batch
from malleable.datamodules.compatibility import check_identity, differences
from malleable.datamodules.stored_identity import KINDS, SETTINGS, load_identity, store_identity, vocabulary_of
from malleable.lightning_modules.distributed_rows import mark_padding_rows
from malleable.lightning_modules.frozen_ddp import leave_frozen_unwrapped
from malleable.lightning_modules.fsdp import check_sharding
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.ranks import gather_over_ranks
from malleable.lightning_modules.serialization import nested, to_plain
from malleable.lightning_modules.stored_weights import CheckedLoading
from malleable.lightning_modules.synchronized_logging import log_synchronized, reduce_figures

log = logging.getLogger(__name__)

Split = Literal["val", "test"]
P = ParamSpec("P")
T = TypeVar("T")


class LossOutput(NamedTuple):
    """Output of :meth:`BaseModule.compute_loss`.

    Attributes:
        loss: Scalar with gradient.
        extras: Further detached scalars, logged as ``{split}_{name}``. In training, names that end in ``_min`` or ``_max`` are reduced accordingly.
        weight: Number of rows or tokens that the loss is a mean of, which is its weight in the mean over batches and ranks in an evaluation. Padding
            rows (rows repeated only to fill a batch) do not count. A tensor should be on the device of the loss, to avoid a synchronisation.
            Default: number of real rows.
        extras_weight: The same for the extras. Default: ``weight``.
    """

    loss: Tensor
    extras: dict[str, Tensor]
    weight: Tensor | int | None = None
    extras_weight: Tensor | int | None = None


def needs_weights(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method of a :class:`BaseModule` that needs the weights, so that it raises an error before ``configure_model``."""

    @functools.wraps(method)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        args[0].check_built()  # type: ignore[attr-defined]
        return method(*args, **options)

    return checked


class BaseModule(CheckedLoading, ABC):
    """Base class of all modules. A subclass implements :meth:`compute_loss` and, for metrics, :meth:`evaluate`.

    Order of hooks: ``__init__`` (stores the arguments, builds no weights), ``setup`` (attributes from the data module),
    ``configure_model`` (weights; a second call does nothing), ``configure_metrics``.

    Args:
        optimizer: Factory of the optimizer, called with the trainable parameters. Default: :meth:`default_optimizer`.
        lr_scheduler: Factory of the learning-rate scheduler, which is stepped after every optimizer step. Default: :meth:`default_lr_scheduler`.
    """

    trains: ClassVar[bool] = True
    """False for methods without training: `test` and `predict` then need no checkpoint."""
    required_from_datamodule: ClassVar[tuple[str, ...]] = ()
    """Attributes that ``setup`` copies from the data module if they are ``None``. Their absence is an error."""
    optional_from_datamodule: ClassVar[tuple[str, ...]] = ()
    """Attributes that ``setup`` copies from the data module if they are ``None``. They may stay ``None``."""
    weight_settings: ClassVar[tuple[str, ...]] = ()
    """Dotted names of constructor arguments that change the output of given weights. A checkpoint must have the module's values."""
    shards_weights: ClassVar[bool] = False
    """Whether ``configure_model`` shards the weights over ranks with FSDP2."""
    reads_text: ClassVar[bool] = True
    """Whether the weights depend on the tokenizer and the prompt template, besides the items."""
    new_items: ClassVar[str] = "the model was not trained on them"
    """State of the weights of items that are appended to the catalogue of a checkpoint, for a log message."""

    def __init__(self, optimizer: OptimizerCallable | None = None, lr_scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.eval_metrics: dict[str, dict[str, Metric]] = {}
        self._step_figures: list[dict[str, Tensor]] = []
        self._loss_sums: dict[str, dict[str, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Copy attributes from the data module. Attributes that the module already has must match.

        Raises:
            MisconfigurationException: If a required attribute is missing, or an attribute of the data module differs from the module's.
        """
        self._leave_steps_uncompiled()
        check_sharding(self, getattr(self.trainer, "strategy", None))
        source = getattr(self.trainer, "datamodule", None)
        for name in self.data_attributes():
            own, given = getattr(self, name), getattr(source, name, None)
            if own is None and given is None and name in self.required_from_datamodule:
                raise MisconfigurationException(
                    f"{type(self).__name__} needs `{name}`: pass {type(self).__name__}({name}=...) or use a data module that has it"
                )
            if given is None or given is own or (own is not None and name not in KINDS):
                continue
            if own is not None:
                self._check_identity(name, own, given)
            if not _has_tokenizer(own) or _has_tokenizer(given):
                # The catalogue of the data module has the same items, but more recent numbers of interactions.
                setattr(self, name, given)
                self.eval_metrics.clear()
        leave_frozen_unwrapped(getattr(self.trainer, "strategy", None))

    def _leave_steps_uncompiled(self) -> None:
        """Undo ``torch.compile(module)``: steps that log and update metrics cannot be compiled."""
        if self._compiler_ctx is not None:
            log.info("torch.compile(%s): steps run uncompiled, because they log; of language models, the decoder is compiled", type(self).__name__)
            to_uncompiled(self)

    @classmethod
    def data_attributes(cls) -> tuple[str, ...]:
        """Return the names of the attributes that come from the data module."""
        return (*cls.optional_from_datamodule, *cls.required_from_datamodule)

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has created the weights."""
        return True

    def check_built(self) -> None:
        """Check that the weights exist.

        Raises:
            MisconfigurationException: If ``configure_model`` has not been called, or was called without a required attribute.
        """
        if not self.is_built:
            missing = [name for name in self.required_from_datamodule if getattr(self, name) is None]
            first = f"pass {missing[0]}=... and call" if missing else "call"
            raise MisconfigurationException(
                f"{type(self).__name__} has no weights yet: {first} configure_model(), or load a checkpoint; a Trainer does so before it runs"
            )

    def settings(self) -> dict[str, Any]:
        """Return the values of :attr:`weight_settings`, which are stored in checkpoints."""
        return {name: nested(self.hparams, name) for name in self.weight_settings}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings, tokenizer, template, items or labels that the weights depend on."""
        checkpoint[SETTINGS] = self.settings()
        stored = [name for name in self.data_attributes() if name in KINDS and getattr(self, name) is not None]
        for name in stored:
            if not (name == "vocabulary" and "catalog" in stored):  # the catalogue contains the vocabulary
                store_identity(checkpoint, name, getattr(self, name))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore missing attributes that the weights depend on, and compare those that the module has.

        Raises:
            MisconfigurationException: If items, labels, tokenizer or template of the checkpoint differ from the module's.
        """
        for name in self.data_attributes():
            if name not in KINDS:
                continue
            stored, own = load_identity(checkpoint, name), getattr(self, name)
            if stored is None and own is None and name in self.required_from_datamodule:
                raise MisconfigurationException(f"{type(self).__name__} needs `{name}`, which the checkpoint does not contain: pass {name}=...")
            if own is None:
                setattr(self, name, stored)
            elif stored is not None:
                self._check_identity(name, stored, own)

    def _check_identity(self, name: str, stored: Any, given: Any) -> None:
        extend = getattr(getattr(self.attached, "datamodule", None), "extend_catalog", False)
        check_identity(name, stored, given, text=self.reads_text, extend=extend, new_items=self.new_items)

    def check_settings(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint has the settings of this module.

        Raises:
            MisconfigurationException: If a value differs; the message contains both values.
        """
        if SETTINGS not in checkpoint:
            log.warning("the checkpoint was written by an earlier version, without the settings of its model: the settings are not compared")
        elif found := differences(checkpoint[SETTINGS], self.settings()):
            raise MisconfigurationException(
                f"the checkpoint was trained with other settings than this {type(self).__name__} has: {'; '.join(found)}. "
                "Omit these options, or set them to the checkpoint's values"
            )

    @property
    def attached(self) -> Trainer | None:
        """The Trainer that runs the module, or ``None``."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def save_config(self) -> None:
        """Store the constructor arguments in ``hparams`` as plain data, so that checkpoints contain them.

        Must be the last call in the ``__init__`` of a subclass.
        """
        frame = inspect.currentframe()
        assert frame is not None
        with warnings.catch_warnings():
            # Losses are modules. They are converted to plain data below.
            warnings.filterwarnings("ignore", ".*is an instance of `nn.Module` and is already saved during checkpointing")
            self.save_hyperparameters(ignore=[*self.data_attributes(), "optimizer", "lr_scheduler"], frame=frame.f_back)
        for name, value in list(self.hparams.items()):
            self.hparams[name] = to_plain(value)

    @abstractmethod
    def compute_loss(self, batch: Any) -> LossOutput:
        """Compute the loss of a batch, without logging or other side effects."""

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Names of the main test metrics, without the split; reports show these first. Default: none. May be a class attribute."""
        return ()

    def configure_metrics(self) -> dict[str, Metric]:
        """Return new metrics for one evaluation split, by name; :meth:`evaluate` updates them."""
        return {}

    def evaluate(self, batch: Any, metrics: dict[str, Metric]) -> Any:
        """Update the metrics with a batch; callbacks receive the return value as the step's output."""
        return None

    def metrics(self, split: Split) -> dict[str, Metric]:
        """Return the metrics of a split, which are created on first use."""
        if split not in self.eval_metrics:
            self.eval_metrics[split] = {name: metric.to(self.device) for name, metric in self.configure_metrics().items()}
        return self.eval_metrics[split]

    def on_train_start(self) -> None:
        """Restore the positions of loaders in a resumed epoch.

        Lightning omits this if the loaders were created before the checkpoint was read, e.g. to compute the number of steps of a scheduler.
        """
        if self.attached is not None:
            self.attached.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the generator from the step number, so that a resumed run draws the same dropout masks."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        # The product of seeds up to 2**32 exceeds the range of a generator's seed.
        number = (((seed * 1_000_003 + self.current_epoch) * 1_000_003 + batch_idx) * 1_009 + self.global_rank) % (1 << 63)
        # On a CPU, seed only the CPU generator: `torch.manual_seed` also queues a call for accelerators, with a stack trace, in every step.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(number)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **options: Any) -> None:
        """Run the optimizer, and call :meth:`end_of_step` after the last batch of an optimizer step, before callbacks save checkpoints."""
        super().optimizer_step(epoch, batch_idx, *args, **options)
        if self._ends_step(batch_idx):
            self.end_of_step()

    def end_of_step(self) -> None:
        """Run after each optimizer step; does nothing by default."""

    def _ends_step(self, batch_idx: int) -> bool:
        return bool((batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch)

    @float32_by_default()
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss; log loss and extras of an optimizer step after its last batch."""
        output = self.compute_loss(batch)
        figures = {"loss": output.loss.detach(), **output.extras}
        self._step_figures.append({name: value.float() for name, value in figures.items()})
        if self._ends_step(batch_idx):
            self._log_step()
        if self.trainer.strategy.handles_gradient_accumulation:
            # Both Lightning and DeepSpeed divide by the number of accumulated batches.
            return output.loss * self.trainer.accumulate_grad_batches
        return output.loss

    def log_loss(self, batch: Any, split: Split) -> LossOutput | None:
        """Accumulate the loss of an evaluation batch; the mean over the distinct rows of all ranks is logged at the end of the epoch."""
        output = self.compute_loss(batch)
        device = output.loss.device
        # float64 avoids rounding errors in long evaluations; MPS does not support it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        rows = (batch.sample_id >= 0).sum() if output.weight is None else torch.as_tensor(output.weight, device=device)
        others = rows if output.extras_weight is None else torch.as_tensor(output.extras_weight, device=device)
        sums = self._loss_sums.setdefault(split, {})
        for name, value in {"loss": output.loss, **output.extras}.items():
            weight = (rows if name == "loss" else others).to(dtype)
            # The mean over a batch of padding rows only is undefined.
            total = torch.where(weight > 0, value.detach().to(dtype) * weight, 0.0)
            sums[name] = sums.get(name, 0.0) + torch.stack([total, weight])
        return output

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Accumulate the loss and update the metrics."""
        return self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Accumulate the loss and update the metrics."""
        return self._evaluation_step(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and the metrics."""
        self._log_mean_loss("val")
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean loss and the metrics."""
        self._log_mean_loss("test")
        self._log_metrics("test")

    def configure_optimizers(self) -> Any:
        """Return one optimizer over all parameter groups, with its learning-rate scheduler."""
        groups = self.parameter_groups()
        optimizer = self.optimizer(groups) if self.optimizer is not None else self.default_optimizer(groups)
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            # Lightning does not clip gradients that a fused optimizer unscales in its step; without this flag Lightning unscales them itself.
            optimizer._step_supports_amp_scaling = False
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler is not None else self.default_lr_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of trainable parameters; weight decay applies to matrices, not to vectors."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            raise MisconfigurationException(f"{type(self).__name__} has no trainable parameter; use `test` or `predict`, or unfreeze parameters")
        # A parameter partitioned by DeepSpeed is empty; `ds_shape` is its full shape.
        dims = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trainable]
        matrices = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim >= 2]
        vectors = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the default optimizer of the method."""
        return torch.optim.AdamW(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the default learning-rate scheduler of the method, or ``None`` for a constant rate."""
        return None

    @float32_by_default()
    def _evaluation_step(self, batch: Batch, batch_idx: int, split: Split) -> Any:
        if batch_idx == 0:
            # Discard the state of an evaluation that was interrupted.
            self._loss_sums.pop(split, None)
            for metric in self.metrics(split).values():
                metric.reset()
        batch.sample_id = mark_padding_rows(batch.sample_id, self.attached, split, batch_idx)
        self.log_loss(batch, split)
        return self.evaluate(batch, self.metrics(split))

    def _log_step(self) -> None:
        """Log means over the batches of an optimizer step and over the ranks, equal to those of one large batch on one device."""
        batches, self._step_figures = self._step_figures, []
        # Lightning reads the values of progress bars after every batch, which synchronises on accelerators. The progress bars of the command line
        # read the loss when they print it.
        on_cpu = self.device.type == "cpu"
        for name, value in reduce_figures(batches, self.trainer.strategy.reduce).items():
            self.log(f"train_{name}", value, prog_bar=on_cpu and name == "loss", batch_size=1)

    def _log_mean_loss(self, split: Split) -> None:
        sums = self._loss_sums.pop(split, {})
        # A rank without a batch must take part in the reduction, or the other ranks would wait for it.
        names = list(dict.fromkeys(name for own in gather_over_ranks(list(sums)) for name in own))
        if not names:
            return
        nothing = torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        # Both sums are reduced to means over ranks; the number of ranks cancels in their ratio.
        totals, weights = self.trainer.strategy.reduce(torch.stack([sums.get(name, nothing) for name in names]), reduce_op="mean").unbind(1)
        for name, value in zip(names, totals / weights, strict=True):
            log_synchronized(self, f"{split}_{name}", value.float(), prog_bar=name == "loss")

    def _log_metrics(self, split: Split) -> None:
        for metric in self.metrics(split).values():
            for name, value in metric.compute().items():
                log_synchronized(self, f"{split}_{name}", value)
            metric.reset()


def _has_tokenizer(data: Any) -> bool:
    vocabulary = vocabulary_of(data)
    return vocabulary is not None and vocabulary.tokenizer is not None
