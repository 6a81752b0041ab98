"""Causal language model of text."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import PackedBatch, Vocabulary
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning


class CausalLM(LanguageModel):
    """Causal language model, trained by maximum likelihood on packed documents.

    A frozen model is not trained. With ``--trainer.max_steps 0``, ``fit`` then only runs callbacks that change a model after training, such as
    ``AlphaEdit``, and checkpoints contain only their changes.

    Args:
        language_model: Model, adapters and precision of the weights.
        vocabulary: Vocabulary of the texts. Default: taken from the data module.
        frozen: Do not train any weights.
        tuning: Settings of the default optimizer and scheduler.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.
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
        """Compute the negative log-likelihood per token, in nats, over the tokens of the optimizer step."""
        return self.answer_loss(batch)
