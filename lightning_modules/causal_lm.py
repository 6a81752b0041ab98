"""A causal language model that reads plain text: from scratch, tuned, or as it was published."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import PackedBatch, Vocabulary
from malleable.lightning_modules.base import BaseModule, LossOutput
from malleable.lightning_modules.functional.logps import packed_token_logps
from malleable.lightning_modules.metrics.editing import Perplexity
from malleable.lightning_modules.plain import from_plain
from malleable.lightning_modules.pretrained import LanguageModelConfig, build_language_model, fingerprint, save_language_model
from malleable.lightning_modules.trained_state import keep_trained, refuse_misfit
from malleable.lightning_modules.tuning import Tuning

log = logging.getLogger(__name__)


class CausalLM(BaseModule):
    """Maximum likelihood of text, packed in rows of whole documents.

    Frozen, it takes a published model as it is: with ``--trainer.max_steps 0`` a fit makes nothing but what post-fit callbacks make, and
    checkpoints hold nothing but that.

    Args:
        language_model: Which model and how it is tuned.
        vocabulary: Of the tokenizer; taken from the data module when left out.
        frozen: Train nothing.
        tuning: Rates of the default optimizer and schedule.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead.
    """

    needs: ClassVar[tuple[str, ...]] = ("vocabulary",)
    strict_loading = False

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        vocabulary: Vocabulary | None = None,
        frozen: bool = False,
        tuning: Tuning | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.language_model: LanguageModelConfig = from_plain(LanguageModelConfig, language_model) or LanguageModelConfig()
        self.vocabulary = vocabulary
        self.frozen = frozen
        self.tuning: Tuning = from_plain(Tuning, tuning) or Tuning()
        self.model: Any = None
        if frozen and self.language_model.name is None:
            raise ValueError("a frozen model needs weights that somebody trained: give language_model.name, or set frozen to false")
        self.remember()

    def configure_model(self) -> None:
        """Build the language model; a second call does nothing, and neither does one before a bare checkpoint has brought the vocabulary."""
        if self.model is not None or self.vocabulary is None:
            return
        strategy: Any = getattr(self.attached, "strategy", None)
        zero3 = strategy.config if getattr(strategy, "zero_stage_3", False) else None
        self.model = build_language_model(self.language_model, self.vocabulary, zero3_config=zero3)
        if self.frozen:
            self.model.requires_grad_(False).eval()
        self._base_fingerprint = fingerprint(self.model)
        total = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        log.info("language model: %s, %.2f M parameters%s", self.language_model.name or "from scratch", total / 1e6, ", frozen" * self.frozen)

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the negative log-likelihood per token, in nats, over the tokens of the optimizer step."""
        logps, targets = packed_token_logps(self.model, batch.input_ids, batch.document_ids, batch.position_ids)
        # Rows repeated only to fill a batch count for nothing.
        targets = targets & (batch.sample_id >= 0)[:, None]
        weight = int(targets.sum())
        count = max(1, weight) if batch.num_step_tokens is None else batch.num_step_tokens
        return LossOutput(-(logps * targets).sum() / count, {}, weight)

    def configure_metrics(self) -> dict[str, Metric]:
        """Perplexity."""
        return {"perplexity": Perplexity()}

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, metrics: dict[str, Metric]) -> None:
        """Add up log-likelihoods."""
        logps, targets = packed_token_logps(self.model, batch.input_ids, batch.document_ids, batch.position_ids)
        metrics["perplexity"].update(logps, targets & (batch.sample_id >= 0)[:, None])

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the log-likelihood of each row, ``(B,)``, nats."""
        logps, targets = packed_token_logps(self.model, batch.input_ids, batch.document_ids, batch.position_ids)
        return (logps * targets).sum(1)

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
        return self.tuning.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains or was edited, the vocabulary, and the identity of what does not train."""
        keep_trained(self.model, checkpoint)
        checkpoint["base_fingerprint"] = self._base_fingerprint
        if self.vocabulary is not None:
            checkpoint["vocabulary"] = asdict(self.vocabulary)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model for a bare checkpoint, and refuse one that was trained on another base or another vocabulary."""
        if self.vocabulary is None and "vocabulary" in checkpoint:
            self.vocabulary = Vocabulary(**checkpoint["vocabulary"])
        if self.vocabulary is None:
            raise MisconfigurationException(f"{type(self).__name__} needs the vocabulary, and the checkpoint has none: pass vocabulary=...")
        self.configure_model()
        refuse_misfit(self, checkpoint, self._base_fingerprint, self.language_model.name)

    def on_train_end(self) -> None:
        """Write the trained model into the run folder: ``adapter/`` in PEFT format or ``model/`` in Hugging Face format."""
        folder = self.trainer.log_dir
        if folder is None or self.frozen or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.export(Path(folder))

    def export(self, folder: Path) -> Path:
        """Save the adapter or the whole model under ``folder``; under DeepSpeed every rank must call it."""
        path = folder / ("adapter" if hasattr(self.model, "peft_config") else "model")
        save_language_model(self.model, path, tokenizer=self.vocabulary.tokenizer if self.vocabulary else None, write=self.global_rank == 0)
        return path
