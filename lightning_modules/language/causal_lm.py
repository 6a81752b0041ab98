"""A causal language model that reads plain text: from scratch, tuned, or as it was published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import PackedBatch, Vocabulary
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.language.logps import packed_batch_logps
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.tuned_weights import TunedWeights
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.metrics.editing import Perplexity
from malleable.lightning_modules.plain import from_plain


class CausalLM(TunedWeights, BaseModule):
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
    query_fields: ClassVar[tuple[str, ...]] = ()
    answer_fields: ClassVar[tuple[str, ...]] = ("log_likelihood",)

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

    @property
    def words(self) -> Vocabulary | None:
        """The vocabulary."""
        return self.vocabulary

    @needs_weights
    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the negative log-likelihood per token, in nats, over the tokens of the optimizer step."""
        logps, targets = packed_batch_logps(self.model, batch)
        # Rows repeated only to fill a batch count for nothing.
        targets = targets & (batch.sample_id >= 0)[:, None]
        weight = targets.sum()
        count = weight.clamp_min(1) if batch.num_step_tokens is None else batch.num_step_tokens
        return LossOutput(-(logps * targets).sum() / count, {}, weight)

    def configure_metrics(self) -> dict[str, Metric]:
        """Perplexity."""
        return {"perplexity": Perplexity()}

    def log_loss(self, batch: PackedBatch, split: Split) -> LossOutput | None:
        """Add up the loss, and the perplexity from the same pass."""
        output = super().log_loss(batch.replace(num_step_tokens=None), split)
        assert output is not None
        assert isinstance(output.weight, Tensor)
        self.metrics(split)["perplexity"].update(output.loss, output.weight)
        return output

    @needs_weights
    @float32_by_default()
    def predict_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the log-likelihood of each row, ``(B,)``, nats."""
        logps, targets = packed_batch_logps(self.model, batch)
        return (logps * targets).sum(1)

    def describe(self, batch: PackedBatch, found: Tensor) -> Iterator[tuple[tuple[Any, ...], list[tuple[float]]]]:
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
