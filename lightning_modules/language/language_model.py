"""Base class of language-model methods."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, PreferenceBatch, Recommendations, Vocabulary
from malleable.datamodules.identity import check_folder, write_folder
from malleable.datamodules.negatives import NegativeSampler
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.language.attention import avoid_planned_kernels
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_batch_logps
from malleable.lightning_modules.language.checkpoints import keep_trained, refuse_misfit
from malleable.lightning_modules.language.compiled import compile_decoder, compiled_passes
from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model, fingerprint
from malleable.lightning_modules.language.export import export_result, is_sharded, registered_checkpoint
from malleable.lightning_modules.language.item_decoding import Decoding, ItemDecoder
from malleable.lightning_modules.language.limits import check_compile, check_passes
from malleable.lightning_modules.language.model_settings import model_settings
from malleable.lightning_modules.language.precision import check_training_precision
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.metrics.editing import Perplexity
from malleable.lightning_modules.metrics.ranking import check_ks
from malleable.lightning_modules.recommendation.evaluation import recommendation_headline, recommendation_metrics, update_metrics
from malleable.lightning_modules.serialization import from_plain

log = logging.getLogger(__name__)


class LanguageModel(BaseModule):
    """A causal language model: configuration, weights, tuning, checkpoints and exports. Base class of all language-model methods.

    With a catalogue, the model recommends items by writing their titles (:meth:`recommend`); validation and test measure ranking and exposure.
    Without one, they measure the perplexity and what the loss returns.

    Checkpoints hold what is trained or was edited, and a fingerprint of the rest.

    Args:
        language_model: Which model and how it is tuned.
        vocabulary: Tokens of the texts; taken from the catalogue or the data module when left out.
        catalog: The items to recommend; taken from the data module when left out and if it has one.
        frozen: Train nothing.
        decoding: How titles are decoded.
        tuning: Rates of the default optimizer and schedule.
        ks: Cut-offs of the ranking metrics.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead.
    """

    required_from_datamodule: ClassVar[tuple[str, ...]] = ("vocabulary",)
    optional_from_datamodule: ClassVar[tuple[str, ...]] = ("catalog",)
    query_fields: ClassVar[tuple[str, ...]] = ()
    answer_fields: ClassVar[tuple[str, ...]] = ("log_likelihood",)
    weight_settings: ClassVar[tuple[str, ...]] = (
        "language_model.quantization",
        "language_model.lora.r",
        "language_model.lora.alpha",
        "language_model.lora.target_modules",
        "language_model.scratch.hidden_size",
        "language_model.scratch.num_layers",
        "language_model.scratch.num_heads",
        "language_model.scratch.intermediate_size",
        "language_model.scratch.max_length",
    )
    strict_loading = False

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        vocabulary: Vocabulary | None = None,
        catalog: Catalog | None = None,
        *,
        frozen: bool = False,
        decoding: Decoding | None = None,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.language_model: LanguageModelConfig = from_plain(LanguageModelConfig, language_model) or LanguageModelConfig()
        if frozen and self.language_model.name is None:
            raise ValueError("a frozen model needs trained weights: give language_model.name, or set frozen to false")
        self._vocabulary = vocabulary
        self.catalog = catalog
        self.frozen = frozen
        self.decoding: Decoding = from_plain(Decoding, decoding) or Decoding()
        self.tuning: Tuning = from_plain(Tuning, tuning) or Tuning()
        self.ks = check_ks(ks)
        self.model: Any = None
        self._items: ItemDecoder | None = None
        self._base_fingerprint = ""
        self._exported = False
        self._compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of the texts; ``None`` until the data or a checkpoint has brought them."""
        return self.catalog.vocabulary if self.catalog is not None else self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has made the weights."""
        return self.model is not None

    def setup(self, stage: str) -> None:
        """Refuse a precision in which the weights cannot be trained, and a fit of nothing where the strategy needs an optimizer."""
        if self._compiler_ctx is not None:
            # Of `torch.compile(module)` the decoder remains compiled.
            self._compiler = self._compiler_ctx["dynamo_ctx"]
        super().setup(stage)
        if self.model is not None:
            self._compile()
        if stage == "fit" and not self.frozen:
            check_training_precision(self.trainer, self.language_model)
        elif stage == "fit" and getattr(self.trainer.strategy, "handles_gradient_accumulation", False):
            raise MisconfigurationException(
                f"{type(self).__name__}(frozen=True) cannot run `fit` with {type(self.trainer.strategy).__name__}, which needs an optimizer: use "
                "`test`, `validate` or `predict`, or one device or ddp (--config base/ddp.yaml)"
            )

    @float32_by_default()
    def configure_model(self) -> None:
        """Build the language model; a second call does nothing, and neither does a call without a vocabulary.

        Raises:
            MisconfigurationException: If the model is an exported one that was trained with another tokenizer.
        """
        if self.model is not None or self.vocabulary is None:
            return
        for name in (self.language_model.name, self.language_model.adapter):
            check_folder(name, self.catalog or self.vocabulary)
        avoid_planned_kernels()
        strategy: Any = getattr(self.attached, "strategy", None)
        zero3 = strategy.config if getattr(strategy, "zero_stage_3", False) else None
        self.model = build_language_model(self.language_model, self.vocabulary, zero3_config=zero3)
        if self.frozen:
            self.model.requires_grad_(False).eval()
        self._base_fingerprint = fingerprint(self.model)
        check_passes(self.model, strategy, zero3, shared_prompt=bool(self.decoding.shared_prompt))
        self._compile()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "language model: %s, %.2f M of %.2f M parameters trained",
            self.language_model.name or "from scratch",
            trainable / 1e6,
            sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()) / 1e6,
        )

    def _compile(self) -> None:
        """Compile the decoder where that is set."""
        compiler = self._compiler or self.language_model.compile
        if compiler is not None:
            check_compile(getattr(self.attached, "strategy", None))
            compile_decoder(self.model, compiler)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss; the decoder runs compiled where that is set."""
        with compiled_passes():
            return super().training_step(batch, batch_idx)

    def log_loss(self, batch: Any, split: Split) -> LossOutput | None:
        """Add up the loss of an evaluation batch; the decoder runs compiled where that is set."""
        with compiled_passes():
            if getattr(batch, "num_step_tokens", None) is not None:
                batch = batch.replace(num_step_tokens=None)  # the mean over this batch's own tokens
            output = super().log_loss(batch, split)
        if output is not None and "perplexity" in (metrics := self.metrics(split)) and not isinstance(batch, PreferenceBatch):
            metrics["perplexity"].update(output.loss, output.weight)
        return output

    @property
    def items(self) -> ItemDecoder:
        """Finds items of the catalogue.

        Raises:
            MisconfigurationException: If there is no catalogue.
        """
        if self.catalog is None:
            raise MisconfigurationException(
                f"{type(self).__name__} recommends items of a catalogue, and has none: pass catalog=..., or use a data module that has one"
            )
        if self._items is None or self._items.catalog is not self.catalog:
            self._items = ItemDecoder(self.catalog, self.decoding)
        return self._items

    @property
    def weights_version(self) -> Hashable:
        """Changes whenever a Trainer changes the weights; ``None`` outside of one, where nothing is known."""
        trainer = self.attached
        return None if trainer is None else (trainer.global_step, self.device)

    @property
    def sync_any(self) -> Callable[[bool], bool] | None:
        """Returns whether a flag is true on any rank, where ranks must make equally many forward passes because weights are sharded."""
        strategy: Any = getattr(self.attached, "strategy", None)
        sharded = getattr(strategy, "zero_stage_3", False) or isinstance(strategy, FSDPStrategy)
        return partial(strategy.reduce_boolean_decision, all=False) if sharded else None

    @needs_weights
    def answer_loss(self, batch: AnswerBatch | PackedBatch) -> LossOutput:
        """Return the negative log-likelihood of the true answers, in nats, over the answer tokens of the optimizer step.

        Of a :class:`PackedBatch` every token but each document's first is a target.
        """
        # Rows repeated only to fill a batch count for nothing.
        real = batch.sample_id >= 0
        if isinstance(batch, PackedBatch):
            logps, targets = packed_batch_logps(self.model, batch)
            targets = targets & real[:, None]
        else:
            targets = batch.answer_mask[:, :1] & real[:, None, None]
            parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids[:, :1], targets)
            logps = answer_token_logps(self.model, *parts, shared_prompt=self.decoding.shared_prompt)
        weight = targets.sum()
        count = weight.clamp_min(1) if batch.num_step_tokens is None else batch.num_step_tokens
        return LossOutput(-(logps * targets).sum() / count, {}, weight)

    @needs_weights
    def recommend(self, batch: AnswerBatch, k: int | None = None) -> Recommendations:
        """Find the k most probable titles of each row.

        Args:
            batch: Rows with prompts; what they have seen is left out if so decided, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        options: Any = {"weights_version": self.weights_version, "sync_any": self.sync_any}
        return self.items.recommend(self.model, batch, k or max(self.ks), **options)

    @needs_weights
    def generate_negatives(self, batch: AnswerBatch, sampler: NegativeSampler, seed: int = 0) -> Tensor:
        """Generate rejected answers of a batch; see :func:`~malleable.lightning_modules.recommendation.negatives.generate_negatives`."""
        options: Any = {"weights_version": self.weights_version, "sync_any": self.sync_any}
        return self.items.generate_negatives(self.model, batch, sampler, seed, **options)

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Main metrics of recommended lists; the perplexity where there is no catalogue."""
        return ("perplexity",) if self.catalog is None else recommendation_headline(self.ks)

    def configure_metrics(self) -> dict[str, Metric]:
        """Accuracy and exposure of recommended lists; without a catalogue the perplexity."""
        return {"perplexity": Perplexity()} if self.catalog is None else recommendation_metrics(self.catalog, self.ks)

    def evaluate(self, batch: Any, metrics: dict[str, Metric]) -> Recommendations | None:
        """Recommend, and compare with the true item; nothing without a catalogue."""
        if self.catalog is None:
            return None
        recommended = self.recommend(batch)
        update_metrics(metrics, recommended, batch)
        return recommended

    @needs_weights
    @float32_by_default()
    def predict_step(self, batch: Any, batch_idx: int) -> Recommendations | Tensor:
        """Recommend; without a catalogue, return the log-likelihood of each row, ``(B,)``, in nats."""
        if self.catalog is not None:
            return self.recommend(batch)
        if isinstance(batch, PackedBatch):
            logps, targets = packed_batch_logps(self.model, batch)
        else:
            targets = batch.answer_mask[:, :1]
            logps = answer_token_logps(self.model, batch.prompt_ids, batch.prompt_mask, batch.answer_ids[:, :1], targets)
        return (logps * targets).flatten(1).sum(1)

    def describe(self, batch: Any, found: Tensor) -> Iterator[tuple[tuple[Any, ...], list[tuple[float]]]]:
        """Return the log-likelihood of each row, for :class:`~malleable.callbacks.predictions.PredictionWriter`."""
        return (((), [(value,)]) for value in found.tolist())

    def configure_optimizers(self) -> Any:
        """Make the optimizer, none for a frozen model.

        Raises:
            MisconfigurationException: If a frozen model is to be trained.
        """
        if not self.frozen:
            return super().configure_optimizers()
        if self.trainer.max_steps != 0 and self.trainer.max_epochs != 0:
            raise MisconfigurationException(f"{type(self).__name__}(frozen=True) trains nothing: set --trainer.max_steps 0")
        return None

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW at the module's own rate."""
        return self.tuning.optimizer(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Linear rise, then decay to zero over the run."""
        return self.tuning.scheduler(optimizer, self.trainer.estimated_stepping_batches)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the model as it was built, whatever options or files they came from."""
        settings = model_settings(self.model, scratch=self.language_model.name is None)
        return {"language_model.quantization": self.language_model.quantization, **settings}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what trains or was edited, the identity of what does not train, and what the weights depend on."""
        super().on_save_checkpoint(checkpoint)
        keep_trained(self.model, checkpoint)
        checkpoint["base_fingerprint"] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model for a bare checkpoint, and refuse one of another base, vocabulary or catalogue, or other settings."""
        super().on_load_checkpoint(checkpoint)
        if self._items is not None:
            self._items.forget_weights()
        self.configure_model()
        self.check_settings(checkpoint)
        refuse_misfit(self, checkpoint, self._base_fingerprint, self.language_model.name)

    def on_train_end(self) -> None:
        """Export the weights in memory where no checkpoint can be read in their place: later they are no longer gathered."""
        self._exported = False
        if is_sharded(self.trainer) and registered_checkpoint(self.trainer) is None and (folder := self._run_folder()) is not None:
            self.export(folder)
            self._exported = True

    def on_fit_end(self) -> None:
        """Export the run's result, which is also what ``test`` measures, after all edits: ``adapter/`` (PEFT) or ``model/`` (Hugging Face).

        A run that was killed between its last step and this one exports when it is resumed.
        """
        folder = self._run_folder()
        if folder is None or self._exported:
            return
        path = registered_checkpoint(self.trainer)
        if not self.trainer.is_global_zero:
            return
        if path is None:
            log.info("no checkpoint was saved: the weights in memory are exported")
        self.export(folder, path)

    def export(self, folder: Path, checkpoint: Path | None = None) -> Path:
        """Save the adapter or the whole model under ``folder``.

        An adapter whose base model was edited is merged into it, and saved as a whole model.

        Args:
            folder: Gets the folder ``adapter`` or ``model``.
            checkpoint: Take the weights from this checkpoint instead of memory; one rank is enough then. From memory, under DeepSpeed every
                rank must call it.
        """
        write = self.global_rank == 0
        path = export_result(self.model, folder, checkpoint=checkpoint, tokenizer=self.vocabulary.tokenizer if self.vocabulary else None, write=write)
        if write and self.catalog is not None:
            write_folder(path, "catalog", self.catalog, self.settings())
        elif write and self.vocabulary is not None:
            write_folder(path, "vocabulary", self.vocabulary, self.settings())
        return path

    def _run_folder(self) -> Path | None:
        """Return where to export to, ``None`` where there is nothing to export."""
        trainer: Any = self.trainer
        skipped = trainer.log_dir is None or self.frozen or trainer.fast_dev_run or trainer.interrupted
        return None if skipped else Path(trainer.log_dir)
