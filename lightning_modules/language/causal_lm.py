"""A causal language model of plain text."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import PackedBatch, Vocabulary
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning


class CausalLM(LanguageModel):
    """Maximum likelihood of text, packed in rows of whole documents.

    A frozen model keeps its published weights: with ``--trainer.max_steps 0``, ``fit`` only runs the callbacks that change a model after training,
    and checkpoints hold their changes alone.

    Args:
        language_model: Which model and how it is tuned.
        vocabulary: Tokens of the texts; taken from the data module when left out.
        frozen: Train nothing.
        tuning: Rates of the default optimizer and schedule.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead.
    """

    optional_from_datamodule = ()

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        vocabulary: Vocabulary | None = None,
        frozen: bool = False,
        tuning: Tuning | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(language_model, vocabulary, frozen=frozen, tuning=tuning, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.save_config()

    def compute_loss(self, batch: PackedBatch) -> LossOutput:
        """Return the negative log-likelihood per token, in nats, over the tokens of the optimizer step."""
        return self.answer_loss(batch)
