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
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, PreferenceBatch, Recommendations, Vocabulary
from malleable.datamodules.compatibility import check_exported_folder
from malleable.datamodules.negative_samplers import NegativeSampler
from malleable.datamodules.stored_identity import write_folder
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.fsdp import data_parallel_mesh, shard_decoder
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.language.attention import avoid_planned_kernels
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_batch_logps
from malleable.lightning_modules.language.checkpoints import check_fit, remove_frozen
from malleable.lightning_modules.language.compiled import compile_decoder, compiled_passes
from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model, fingerprint
from malleable.lightning_modules.language.export import export_result, is_sharded, registered_checkpoint
from malleable.lightning_modules.language.item_decoding import Decoding, ItemDecoder
from malleable.lightning_modules.language.limits import check_compile, check_passes
from malleable.lightning_modules.language.model_settings import model_settings
from malleable.lightning_modules.language.precision import check_training_precision
from malleable.lightning_modules.language.preference import evaluate_preferences, true_likelihood
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.metrics.editing import Perplexity
from malleable.lightning_modules.metrics.ranking import check_ks
from malleable.lightning_modules.recommendation.evaluation import recommendation_headline, recommendation_metrics, update_metrics
from malleable.lightning_modules.serialization import from_plain

log = logging.getLogger(__name__)


class LanguageModel(BaseModule):
    """Base class of language-model methods: configuration, weights, tuning, checkpoints and exports of a causal language model.

    With a catalogue, the model recommends items by generating their titles (:meth:`recommend`), and validation and test measure ranking and exposure.
    Without a catalogue, they measure the perplexity and the loss, with its ``extras``.

    Checkpoints contain trained and edited weights, and a fingerprint of all others.

    Args:
        language_model: Model, adapters and precision of the weights.
        vocabulary: Vocabulary of the texts. Default: taken from the catalogue or the data module.
        catalog: The items to recommend. Default: taken from the data module, if it has a catalogue.
        frozen: Do not train any weights.
        decoding: Settings of decoding.
        tuning: Settings of the default optimizer and scheduler.
        ks: Cut-offs of the ranking metrics.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.
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
    new_items: ClassVar[str] = "no weights are added: the model scores the tokens of their titles, on which it was not trained"
    strict_loading = False
    shards_weights = True

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
            raise ValueError("a frozen model needs pretrained weights: give language_model.name, or set frozen to false")
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
        """Vocabulary of the texts; ``None`` until the data module or a checkpoint sets it."""
        return self.catalog.vocabulary if self.catalog is not None else self._vocabulary

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has built the model."""
        return self.model is not None

    def setup(self, stage: str) -> None:
        """Copy attributes from the data module, and check precision and strategy.

        Raises:
            MisconfigurationException: If the weights cannot be trained in this precision, or if a frozen model is fitted with a strategy that
                needs an optimizer.
        """
        if self._compiler_ctx is not None:
            # After `torch.compile(module)`, only the decoder is compiled.
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
        """Build the language model; a second call, or a call without a vocabulary, does nothing.

        Raises:
            MisconfigurationException: If an exported model was trained with another tokenizer.
        """
        if self.model is not None or self.vocabulary is None:
            return
        for name in (self.language_model.name, self.language_model.adapter):
            check_exported_folder(name, self.catalog or self.vocabulary)
        avoid_planned_kernels()
        strategy: Any = getattr(self.attached, "strategy", None)
        zero3 = strategy.config if getattr(strategy, "zero_stage_3", False) else None
        self.model = build_language_model(self.language_model, self.vocabulary, zero3_config=zero3)
        if self.frozen:
            self.model.requires_grad_(False).eval()
        self._base_fingerprint = fingerprint(self.model)
        check_passes(self.model, strategy, zero3, shared_prompt=bool(self.decoding.shared_prompt))
        mesh = data_parallel_mesh(strategy)
        if mesh is not None:
            shard_decoder(self.model, mesh)
        self._compile()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "language model %s: %.2f M of %.2f M parameters are trained",
            self.language_model.name or "from scratch",
            trainable / 1e6,
            sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()) / 1e6,
        )

    def _compile(self) -> None:
        """Compile the decoder if a compiler is set."""
        compiler = self._compiler or self.language_model.compile
        if compiler is not None:
            check_compile(getattr(self.attached, "strategy", None))
            compile_decoder(self.model, compiler)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss; the decoder runs compiled if a compiler is set."""
        with compiled_passes():
            return super().training_step(batch, batch_idx)

    def log_loss(self, batch: Any, split: Split) -> LossOutput | None:
        """Accumulate the loss of an evaluation batch; the decoder runs compiled if a compiler is set."""
        with compiled_passes():
            # The loss is then the mean over the tokens or rows of this batch.
            batch = batch.replace(**{name: None for name in ("num_step_tokens", "num_step_rows") if getattr(batch, name, None) is not None})
            output = super().log_loss(batch, split)
        if output is not None and "perplexity" in (metrics := self.metrics(split)):
            metrics["perplexity"].update(*true_likelihood(output, batch))
        return output

    @property
    def items(self) -> ItemDecoder:
        """Decoder of items of the catalogue.

        Raises:
            MisconfigurationException: If there is no catalogue.
        """
        if self.catalog is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no catalogue of items to recommend: pass catalog=..., or use a data module that has one"
            )
        if self._items is None or self._items.catalog is not self.catalog:
            self._items = ItemDecoder(self.catalog, self.decoding)
        return self._items

    @property
    def weights_version(self) -> Hashable:
        """Value that changes whenever a Trainer changes the weights; ``None`` without a Trainer."""
        trainer = self.attached
        return None if trainer is None else (trainer.global_step, self.device)

    @property
    def sync_any(self) -> Callable[[bool], bool] | None:
        """Function that returns whether a flag is true on any rank; ``None`` if weights are not sharded and ranks can run independently."""
        strategy: Any = getattr(self.attached, "strategy", None)
        sharded = getattr(strategy, "zero_stage_3", False) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
        return partial(strategy.reduce_boolean_decision, all=False) if sharded else None

    @needs_weights
    def answer_loss(self, batch: AnswerBatch | PackedBatch) -> LossOutput:
        """Compute the negative log-likelihood of the true answers, in nats, as a mean over the answer tokens of the optimizer step.

        In a :class:`PackedBatch`, all tokens but the first of each document are targets. Without a catalogue, evaluation also reads rejected answers.
        """
        if isinstance(batch, PreferenceBatch) and self.catalog is None and not self.training:
            return evaluate_preferences(self.model, batch, shared_prompt=self.decoding.shared_prompt)
        # Padding rows do not count.
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
            batch: Rows with prompts; seen items are excluded with ``decoding.exclude_seen``, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        options: Any = {"weights_version": self.weights_version, "sync_any": self.sync_any}
        return self.items.recommend(self.model, batch, k or max(self.ks), **options)

    @needs_weights
    def generate_negatives(self, batch: AnswerBatch, sampler: NegativeSampler, seed: int = 0) -> Tensor:
        """Generate rejected answers of a batch; see :func:`~malleable.lightning_modules.recommendation.generated_negatives.generate_negatives`."""
        options: Any = {"weights_version": self.weights_version, "sync_any": self.sync_any}
        return self.items.generate_negatives(self.model, batch, sampler, seed, **options)

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Main metrics of recommended lists; without a catalogue, the accuracy on preferences and the perplexity."""
        return ("rewards_accuracies", "mean_logps_accuracies", "perplexity") if self.catalog is None else recommendation_headline(self.ks)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return the metrics of accuracy and exposure of recommended lists; without a catalogue, the perplexity."""
        return {"perplexity": Perplexity()} if self.catalog is None else recommendation_metrics(self.catalog, self.ks)

    def evaluate(self, batch: Any, metrics: dict[str, Metric]) -> Recommendations | None:
        """Recommend items and update the metrics; without a catalogue, do nothing."""
        if self.catalog is None:
            return None
        recommended = self.recommend(batch)
        update_metrics(metrics, recommended, batch)
        return recommended

    @needs_weights
    @float32_by_default()
    def predict_step(self, batch: Any, batch_idx: int) -> Recommendations | Tensor:
        """Recommend items; without a catalogue, return log-likelihoods.

        Returns:
            Items, or the log-likelihood of each row, ``(B,)``, in nats: of its documents, or of its first answer given the prompt.
        """
        if self.catalog is not None:
            return self.recommend(batch)
        if isinstance(batch, PackedBatch):
            logps, targets = packed_batch_logps(self.model, batch)
        else:
            targets = batch.answer_mask[:, :1]
            logps = answer_token_logps(self.model, batch.prompt_ids, batch.prompt_mask, batch.answer_ids[:, :1], targets)
        return (logps * targets).flatten(1).sum(1)

    def describe(self, batch: Any, found: Tensor) -> Iterator[tuple[tuple[Any, ...], list[tuple[float]]]]:
        """Return an iterator over the rows, for :class:`~malleable.callbacks.predictions.PredictionWriter`.

        Args:
            batch: Rows.
            found: ``(B,)`` log-likelihoods, as ``predict_step`` returns.

        Returns:
            A pair for each row: an empty tuple, because there are no query fields, and a list with one answer ``(log_likelihood,)``.
        """
        return (((), [(value,)]) for value in found.tolist())

    def configure_optimizers(self) -> Any:
        """Return optimizer and scheduler, or ``None`` for a frozen model.

        Raises:
            MisconfigurationException: If a frozen model is trained.
        """
        if not self.frozen:
            return super().configure_optimizers()
        if self.trainer.max_steps != 0 and self.trainer.max_epochs != 0:
            raise MisconfigurationException(f"{type(self).__name__}(frozen=True) has no trainable weights: set --trainer.max_steps 0")
        return None

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return AdamW with the settings of ``tuning``."""
        return self.tuning.optimizer(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the scheduler of ``tuning``: a linear warm-up, then the schedule ``tuning.decay``."""
        return self.tuning.scheduler(optimizer, self.trainer.estimated_stepping_batches)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the built model."""
        settings = model_settings(self.model, scratch=self.language_model.name is None)
        return {"language_model.quantization": self.language_model.quantization, **settings}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store trained and edited weights, the fingerprint of frozen weights, and the identity of the data."""
        super().on_save_checkpoint(checkpoint)
        remove_frozen(self.model, checkpoint)
        checkpoint["base_fingerprint"] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model if needed, and check base model, vocabulary, catalogue and settings of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        if self._items is not None:
            self._items.clear_embeddings()
        self.configure_model()
        self.check_settings(checkpoint)
        check_fit(self, checkpoint, self._base_fingerprint, self.language_model.name)

    def on_train_end(self) -> None:
        """Export sharded weights if no checkpoint was saved, because they cannot be gathered after training."""
        self._exported = False
        if is_sharded(self.trainer) and registered_checkpoint(self.trainer) is None and (folder := self._run_folder()) is not None:
            self.export(folder)
            self._exported = True

    def on_fit_end(self) -> None:
        """Export the weights that ``test`` measures, after all edits: ``adapter/`` (PEFT) or ``model/`` (Hugging Face).

        A run that was killed between its last step and the export exports when it is resumed.
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
        """Save the adapter or the whole model in a subfolder of ``folder``.

        If the base model of an adapter was edited, the adapter is merged into it, and the whole model is saved.

        Args:
            folder: Parent of the folder ``adapter`` or ``model``.
            checkpoint: Checkpoint to read the weights from; then rank 0 alone may call this method. Default: the weights in memory; if they are
                sharded (DeepSpeed, FSDP2), all ranks must call this method. Only rank 0 writes.

        Returns:
            The folder ``adapter`` or ``model``.
        """
        write = self.global_rank == 0
        path = export_result(self.model, folder, checkpoint=checkpoint, tokenizer=self.vocabulary.tokenizer if self.vocabulary else None, write=write)
        if write and self.catalog is not None:
            write_folder(path, "catalog", self.catalog, self.settings())
        elif write and self.vocabulary is not None:
            write_folder(path, "vocabulary", self.vocabulary, self.settings())
        return path

    def _run_folder(self) -> Path | None:
        """Return the folder for exports, or ``None`` if nothing is exported."""
        trainer: Any = self.trainer
        skipped = trainer.log_dir is None or self.frozen or trainer.fast_dev_run or trainer.interrupted
        return None if skipped else Path(trainer.log_dir)
