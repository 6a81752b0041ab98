"""The base of every module: one step, one way to log, one optimizer, one schedule."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric

from malleable.datamodules.batch import Batch
from malleable.datamodules.identity import KINDS, SETTINGS, check_identity, differences, put, take, vocabulary_of
from malleable.lightning_modules.frozen_ddp import leave_frozen_unwrapped
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.ranks import gather_over_ranks
from malleable.lightning_modules.serialization import nested, plain
from malleable.lightning_modules.stored_weights import CheckedLoading

log = logging.getLogger(__name__)

Split = Literal["val", "test"]
P = ParamSpec("P")
T = TypeVar("T")


class LossOutput(NamedTuple):
    """What a module makes of a batch.

    Attributes:
        loss: Scalar with gradient.
        extras: Detached scalars to log beside it, under ``{split}_{name}``.
        weight: What the loss is a mean over (rows, tokens), so that means over evaluation batches and ranks come out right; rows repeated only to
            fill a batch do not count. A tensor stays on its device. Default: the rows that count.
    """

    loss: Tensor
    extras: dict[str, Tensor]
    weight: Tensor | int | None = None


def needs_weights(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method of a :class:`BaseModule` that computes with its weights: before ``configure_model`` it raises an error that says so."""

    @functools.wraps(method)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        args[0].check_built()  # type: ignore[attr-defined]
        return method(*args, **options)

    return checked


class BaseModule(CheckedLoading, ABC):
    """The steps of all methods; a subclass writes :meth:`compute_loss` and, to be tested, :meth:`evaluate`.

    Order of hooks: ``__init__`` (typed attributes, no weights), ``setup`` (what comes from the data module is set),
    ``configure_model`` (weights; a second call does nothing), ``configure_metrics``.

    Args:
        optimizer: Makes the one optimizer from the trainable parameters; default: AdamW at the module's own rate.
        lr_scheduler: Makes a scheduler, stepped every optimizer step.
    """

    trains: ClassVar[bool] = True
    """False for methods without training: `test` and `predict` then need no checkpoint."""
    required_from_datamodule: ClassVar[tuple[str, ...]] = ()
    """Attributes that, left ``None``, are taken from the data module's attribute of the same name."""
    optional_from_datamodule: ClassVar[tuple[str, ...]] = ()
    """The same for attributes that may stay ``None``."""
    weight_settings: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments, as dotted names, that change what given weights compute: a checkpoint's values must be the module's."""
    reads_text: ClassVar[bool] = True
    """Whether weights depend on the tokenizer and the template, besides the items."""

    def __init__(self, optimizer: OptimizerCallable | None = None, lr_scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.eval_metrics: dict[str, dict[str, Metric]] = {}
        self._step_figures: list[dict[str, Tensor]] = []
        self._loss_sums: dict[str, dict[str, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Take attributes from the data module; what the module has already must be the same.

        Raises:
            MisconfigurationException: If it is nowhere, or the data's is not the module's.
        """
        self._leave_steps_uncompiled()
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
                check_identity(name, own, given, text=self.reads_text, extend=getattr(source, "extend_catalog", False))
            if not _has_tokenizer(own) or _has_tokenizer(given):
                # The data's counts of the same items are the current ones.
                setattr(self, name, given)
                self.eval_metrics.clear()
        leave_frozen_unwrapped(getattr(self.trainer, "strategy", None))

    def _leave_steps_uncompiled(self) -> None:
        """Undo what the Trainer made of ``torch.compile(module)``: steps that log and feed metrics cannot be compiled."""
        if self._compiler_ctx is not None:
            log.info("torch.compile(%s): steps log and run without compilation; of a language model the decoder is compiled", type(self).__name__)
            to_uncompiled(self)

    @classmethod
    def data_attributes(cls) -> tuple[str, ...]:
        """Return the names of the attributes that come from the data module."""
        return (*cls.optional_from_datamodule, *cls.required_from_datamodule)

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has made the weights."""
        return True

    def check_built(self) -> None:
        """Check that there are weights.

        Raises:
            MisconfigurationException: If ``configure_model`` has not been called, or had nothing to build from.
        """
        if not self.is_built:
            missing = [name for name in self.required_from_datamodule if getattr(self, name) is None]
            first = f"pass {missing[0]}=... and call" if missing else "call"
            raise MisconfigurationException(
                f"{type(self).__name__} has no weights yet: {first} configure_model(), or load a checkpoint; a Trainer does so before it runs"
            )

    def settings(self) -> dict[str, Any]:
        """Return the values of :attr:`weight_settings`, which checkpoints store."""
        return {name: nested(self.hparams, name) for name in self.weight_settings}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the weights depend on: settings, tokenizer, template, items or labels."""
        checkpoint[SETTINGS] = self.settings()
        stored = [name for name in self.data_attributes() if name in KINDS and getattr(self, name) is not None]
        for name in stored:
            if not (name == "vocabulary" and "catalog" in stored):  # which has it
                put(checkpoint, name, getattr(self, name))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what the module lacks of what the weights depend on, and refuse what differs.

        Raises:
            MisconfigurationException: If the checkpoint's items, labels, tokenizer or template are not the module's.
        """
        for name in self.data_attributes():
            if name not in KINDS:
                continue
            stored, own = take(checkpoint, name), getattr(self, name)
            if stored is None and own is None and name in self.required_from_datamodule:
                raise MisconfigurationException(f"{type(self).__name__} needs `{name}`, and the checkpoint has none: pass {name}=...")
            if own is None:
                setattr(self, name, stored)
            elif stored is not None:
                source = getattr(self.attached, "datamodule", None)
                check_identity(name, stored, own, text=self.reads_text, extend=getattr(source, "extend_catalog", False))

    def check_settings(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings.

        Raises:
            MisconfigurationException: If a value differs; the message names both.
        """
        if SETTINGS not in checkpoint:
            log.warning("the checkpoint is of an earlier version: it does not store the settings of its model, which are not compared")
        elif found := differences(checkpoint[SETTINGS], self.settings()):
            raise MisconfigurationException(
                f"the checkpoint's weights were trained with other settings than those of this {type(self).__name__}: {'; '.join(found)}. "
                "Leave these options out, or give the checkpoint's values"
            )

    @property
    def attached(self) -> Trainer | None:
        """The Trainer that runs the module, ``None`` outside of one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def save_config(self) -> None:
        """Store the constructor's arguments as plain data; call it last in ``__init__``."""
        frame = inspect.currentframe()
        assert frame is not None
        self.save_hyperparameters(ignore=[*self.data_attributes(), "optimizer", "lr_scheduler"], frame=frame.f_back)
        for name, value in list(self.hparams.items()):
            self.hparams[name] = plain(value)

    @abstractmethod
    def compute_loss(self, batch: Any) -> LossOutput:
        """Compute the loss of a batch; no logging, no side effects."""

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Names of the main test metrics, without the split; reports show these first. Default: none. May be a class attribute."""
        return ()

    def configure_metrics(self) -> dict[str, Metric]:
        """Make the metrics of one evaluation split, by name; each is fed by :meth:`evaluate`."""
        return {}

    def evaluate(self, batch: Any, metrics: dict[str, Metric]) -> Any:
        """Feed the metrics with a batch; what it returns reaches the callbacks as the step's output."""
        return None

    def metrics(self, split: Split) -> dict[str, Metric]:
        """The metrics of a split, made at first use."""
        if split not in self.eval_metrics:
            self.eval_metrics[split] = {name: metric.to(self.device) for name, metric in self.configure_metrics().items()}
        return self.eval_metrics[split]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what the step draws (dropout) by its number, so that a resumed run repeats it exactly."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        # Seeds run up to 2**32, so the product passes what a generator takes.
        number = (((seed * 1_000_003 + self.current_epoch) * 1_000_003 + batch_idx) * 1_009 + self.global_rank) % (1 << 63)
        # On a CPU only its own generator: `torch.manual_seed` also queues a call for accelerators, with the whole stack, in every step.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(number)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`end_of_step` after the last batch of an optimizer step."""
        if self._ends_step(batch_idx):
            self.end_of_step()

    def end_of_step(self) -> None:
        """Do what follows an optimizer step."""

    def _ends_step(self, batch_idx: int) -> bool:
        return bool((batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch)

    @float32_by_default()
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss; the last batch of an optimizer step logs the step's figures."""
        output = self.compute_loss(batch)
        figures = {"loss": output.loss.detach(), **output.extras}
        self._step_figures.append({name: value.float() for name, value in figures.items()})
        if self._ends_step(batch_idx):
            self._log_step()
        if self.trainer.strategy.handles_gradient_accumulation:
            # Lightning divides by the accumulated batches, and then DeepSpeed does so again.
            return output.loss * self.trainer.accumulate_grad_batches
        return output.loss

    def log_loss(self, batch: Any, split: Split) -> LossOutput | None:
        """Add up the loss of an evaluation batch; the epoch's end logs its mean, in which each row of all ranks counts once."""
        output = self.compute_loss(batch)
        weight = (batch.sample_id >= 0).sum() if output.weight is None else torch.as_tensor(output.weight, device=output.loss.device)
        # In float64, so that long evaluations lose nothing; MPS has none.
        weight = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
        sums = self._loss_sums.setdefault(split, {})
        for name, value in {"loss": output.loss, **output.extras}.items():
            # A batch that only repeats rows has no mean.
            total = torch.where(weight > 0, value.detach().to(weight.dtype) * weight, 0.0)
            sums[name] = sums.get(name, 0.0) + torch.stack([total, weight])
        return output

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Log the loss and feed the metrics."""
        return self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Log the loss and feed the metrics."""
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
        """Make one optimizer over the parameter groups, and the schedule stepped with it."""
        groups = self.parameter_groups()
        optimizer = self.optimizer(groups) if self.optimizer is not None else self.default_optimizer(groups)
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            # A fused optimizer could undo the scale of gradients in its step. Lightning does not clip those; it must undo the scale itself.
            optimizer._step_supports_amp_scaling = False
        scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler is not None else self.default_lr_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters; matrices decay, vectors do not."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            raise MisconfigurationException(f"{type(self).__name__} has no trainable parameter; use `test` or `predict`, or unfreeze something")
        # A parameter that DeepSpeed has partitioned is empty; its shape is beside it.
        dims = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trainable]
        matrices = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim >= 2]
        vectors = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the method's own optimizer."""
        return torch.optim.AdamW(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make the method's own schedule, or ``None`` for a constant rate."""
        return None

    @float32_by_default()
    def _evaluation_step(self, batch: Batch, batch_idx: int, split: Split) -> Any:
        if batch_idx == 0:
            # Nothing counts of an evaluation that was interrupted.
            self._loss_sums.pop(split, None)
            for metric in self.metrics(split).values():
                metric.reset()
        batch.sample_id = self._mark_repeats(batch, batch_idx, split)
        self.log_loss(batch, split)
        return self.evaluate(batch, self.metrics(split))

    def _mark_repeats(self, batch: Batch, batch_idx: int, split: Literal["train", "val", "test"]) -> Tensor:
        """Negate the ids of rows that a ``DistributedSampler`` repeated to fill the last batch."""
        trainer = self.attached
        if trainer is None:
            return batch.sample_id
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}[split]
        loader = loaders[0] if isinstance(loaders, list) else loaders
        if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, DistributedSampler):
            return batch.sample_id
        sampler = loader.sampler
        own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
        first = batch_idx * (loader.batch_size or 1)
        position = first + torch.arange(len(batch), device=batch.sample_id.device)
        return torch.where((position < own) | (batch.sample_id < 0), batch.sample_id, -1 - batch.sample_id)

    def _log_step(self) -> None:
        """Log means over the step's batches and over the ranks: what one large batch on one device would have logged."""
        batches, self._step_figures = self._step_figures, []
        means = torch.stack([torch.stack(list(figures.values())) for figures in batches]).mean(0)
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        for name, value in zip(batches[0], means, strict=True):
            self.log(f"train_{name}", value, prog_bar=name == "loss", batch_size=1)

    def _log_mean_loss(self, split: Split) -> None:
        sums = self._loss_sums.pop(split, {})
        # A rank without a batch takes part in the reduction, too: the others would wait for it.
        names = list(dict.fromkeys(name for own in gather_over_ranks(list(sums)) for name in own))
        if not names:
            return
        nothing = torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        # The reduction gives back the mean over ranks of both sums; their ratio is that of the sums.
        totals, weights = self.trainer.strategy.reduce(torch.stack([sums.get(name, nothing) for name in names]), reduce_op="mean").unbind(1)
        for name, value in zip(names, totals / weights, strict=True):
            self.log(f"{split}_{name}", value.float(), prog_bar=name == "loss", rank_zero_only=False)

    def _log_metrics(self, split: Split) -> None:
        for metric in self.metrics(split).values():
            values = metric.compute()
            self.log_dict({f"{split}_{name}": value for name, value in values.items()}, rank_zero_only=False)
            metric.reset()


def _has_tokenizer(described: Any) -> bool:
    vocabulary = vocabulary_of(described)
    return vocabulary is not None and vocabulary.tokenizer is not None
