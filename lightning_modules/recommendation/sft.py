"""Supervised fine-tuning of a recommending language model."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, Vocabulary
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning


class SFT(LanguageModel):
    """Maximum likelihood of the true next title, or of whole packed histories.

    The loss is the mean over all answer tokens of an optimizer step, on any number of devices and accumulated batches.

    Args:
        language_model: Which model and how it is tuned.
        catalog: The items; taken from the data module when left out.
        vocabulary: Tokens of the texts, where there is no catalogue.
        decoding: How titles are decoded.
        tuning: Rates of the default optimizer and schedule.
        ks: Cut-offs of the metrics.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead.

    Source:
        Bao et al. (2023), A Bi-Step Grounding Paradigm for Large Language Models in Recommendation, arXiv:2308.08434 (instruction tuning).
        Differs: only answer tokens bear loss, and answers end with the end-of-sequence token, so that stopping is learnt.
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
        """Return the negative log-likelihood per answer token, in nats."""
        return self.answer_loss(batch)
