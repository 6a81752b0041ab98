"""Supervised fine-tuning of a language-model recommender."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, Vocabulary
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning


class SFT(LanguageModel):
    """Supervised fine-tuning: maximum likelihood of the true next title, or of packed histories.

    The loss is the mean over all answer tokens of an optimizer step, for any number of devices and accumulated batches.

    Args:
        language_model: Model, adapters and precision of the weights.
        catalog: The items. Default: taken from the data module.
        vocabulary: Vocabulary of the texts, if there is no catalogue.
        decoding: Settings of decoding.
        tuning: Settings of the default optimizer and scheduler.
        ks: Cut-offs of the ranking metrics.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.

    Source:
        Bao et al. (2023), A Bi-Step Grounding Paradigm for Large Language Models in Recommendation, arXiv:2308.08434 (instruction tuning).
        Differs: only answer tokens contribute to the loss; answers end with the end-of-sequence token, so that the model learns to stop.
    """

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        catalog: Catalog | None = None,
        vocabulary: Vocabulary | None = None,
        decoding: Decoding | None = None,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(language_model, vocabulary, catalog, decoding=decoding, tuning=tuning, ks=ks, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.save_config()

    def compute_loss(self, batch: AnswerBatch | PackedBatch) -> LossOutput:
        """Compute the negative log-likelihood per answer token, in nats."""
        return self.answer_loss(batch)
