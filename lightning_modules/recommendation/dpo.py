"""Direct preference optimisation of a language model."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.preference import PreferenceTraining
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.preference import Sigmoid
from malleable.lightning_modules.losses.preference_base import PreferenceLoss
from malleable.lightning_modules.serialization import object_from_plain


class DPO(PreferenceTraining, LanguageModel):
    """Direct preference optimisation: prefer chosen answers, or true next titles, to rejected ones, relative to a frozen reference.

    The reference is the model at the start of training. Its log-probabilities are cached and added to the batches by
    :class:`~malleable.callbacks.ReferenceCache`, so that no second model is in memory.

    Args:
        language_model: Model, adapters and precision of the weights.
        catalog: The items. Default: taken from the data module.
        vocabulary: Vocabulary of the texts, if there is no catalogue.
        loss: Preference loss. Default: ``Sigmoid(beta=0.1)``.
        sft_weight: Weight of the negative log-likelihood of the chosen answers, which is added to the preference loss; 0 is standard DPO.
        decoding: Settings of decoding.
        tuning: Settings of the default optimizer and scheduler. Default: learning rate 2e-5.
        ks: Cut-offs of the ranking metrics.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290, Eq. 7.
        Differs: prompt, chosen and rejected answers share one row; dropout is disabled, so that policy and reference are equal at the start.
    """

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        catalog: Catalog | None = None,
        vocabulary: Vocabulary | None = None,
        loss: PreferenceLoss | None = None,
        sft_weight: float = 0.0,
        decoding: Decoding | None = None,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(
            language_model,
            vocabulary,
            catalog,
            decoding=decoding,
            tuning=tuning or Tuning(lr=2e-5),
            ks=ks,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.set_loss(object_from_plain(PreferenceLoss, loss) or Sigmoid(beta=0.1), sft_weight)
        self.save_config()
