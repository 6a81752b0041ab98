"""SPRec: self-play preference optimisation of a language-model recommender."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, PreferenceBatch
from malleable.lightning_modules.base import LossOutput, needs_weights
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.preference import PreferenceTraining
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.preference import Sigmoid
from malleable.lightning_modules.losses.preference_base import PreferenceLoss
from malleable.lightning_modules.serialization import object_from_plain


class SPRec(PreferenceTraining, LanguageModel):
    """SPRec: alternating supervised fine-tuning and preference optimisation, with the model's own recommendations as rejected answers.

    The loss depends on the type of the batch: the negative log-likelihood for an :class:`AnswerBatch` or :class:`PackedBatch`, the preference loss
    for a :class:`PreferenceBatch`. :class:`~malleable.callbacks.SelfPlayLoop` sets the batches of each phase.

    Args:
        language_model: Model, adapters and precision of the weights.
        catalog: The items. Default: taken from the data module.
        loss: Preference loss. Default: ``Sigmoid(beta=0.1)``.
        sft_weight: Weight of the negative log-likelihood of the chosen answers, which is added to the preference loss; 0 is the published method.
        decoding: Settings of decoding.
        tuning: Settings of the default optimizer. ``SelfPlayLoop`` overrides the learning rate in its phases.
        ks: Cut-offs of the ranking metrics.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler; omit it with ``SelfPlayLoop``, which sets the learning rates.

    Source:
        Gao et al. (2025), SPRec: Self-Play to Debias LLM-based Recommendation, WWW, arXiv:2412.09243. Differs: one prompt template in all phases;
        answers end with the end-of-sequence token; only answer tokens contribute to the loss; negatives are items of the catalogue; log-probabilities
        of the reference are cached instead of computed by a second model.
    """

    required_from_datamodule = ("catalog", "vocabulary")
    optional_from_datamodule = ()

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        catalog: Catalog | None = None,
        loss: PreferenceLoss | None = None,
        sft_weight: float = 0.0,
        decoding: Decoding | None = None,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(language_model, None, catalog, decoding=decoding, tuning=tuning, ks=ks, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.set_loss(object_from_plain(PreferenceLoss, loss) or Sigmoid(beta=0.1), sft_weight)
        self.save_config()

    @needs_weights
    def compute_loss(self, batch: PreferenceBatch | AnswerBatch | PackedBatch) -> LossOutput:
        """Compute the preference loss of a :class:`PreferenceBatch`, or the negative log-likelihood of another batch."""
        if isinstance(batch, PreferenceBatch):
            return self.preference_loss(batch)
        return self.answer_loss(batch)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        """Return ``None``: ``SelfPlayLoop`` sets the learning rate of every step."""
