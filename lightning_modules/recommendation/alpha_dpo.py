"""alpha-DPO: preference optimisation with an adaptive margin."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.preference import PreferenceTraining
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.adaptive_margin import AdaptiveMargin
from malleable.lightning_modules.serialization import object_from_plain


class AlphaDPO(PreferenceTraining, LanguageModel):
    """alpha-DPO: prefer chosen answers, or true next titles, to rejected ones, with a margin that adapts to each pair.

    The margin of a pair grows with the separation of its answers by the policy relative to the frozen reference, compared with other pairs; see
    :class:`~malleable.lightning_modules.losses.adaptive_margin.AdaptiveMargin`. The reference is the model at the start of training; its
    log-probabilities are cached by :class:`~malleable.callbacks.ReferenceCache`.

    Args:
        language_model: Model, adapters and precision of the weights.
        catalog: The items. Default: taken from the data module, if it has a catalogue.
        vocabulary: Vocabulary of the texts, if there is no catalogue.
        loss: The loss, with its hyper-parameters. Default: ``AdaptiveMargin()``.
        sft_weight: Weight of the negative log-likelihood of the chosen answers, which is added to the preference loss; 0 is the published method.
        decoding: Settings of decoding.
        tuning: Settings of the default optimizer and scheduler. Default: learning rate 1e-6 with cosine decay, as published for full fine-tuning;
            adapters need about 1e-5, small models trained from scratch about 1e-4.
        ks: Cut-offs of the ranking metrics.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.

    Source:
        Wu et al. (2024), alpha-DPO: Adaptive Reward Margin is What Direct Preference Optimization Needs, ICML 2025, arXiv:2410.10148.
        Differs: statistics of the margins are those of whole optimizer steps, with bias correction, stored in checkpoints, and not changed by
        evaluation (``compat="official"`` of the loss: as in the authors' code); dropout is disabled, so that policy and reference are equal at the
        start.
    """

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        catalog: Catalog | None = None,
        vocabulary: Vocabulary | None = None,
        loss: AdaptiveMargin | None = None,
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
            tuning=tuning or Tuning(lr=1e-6, decay="cosine"),
            ks=ks,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.set_loss(object_from_plain(AdaptiveMargin, loss) or AdaptiveMargin(), sft_weight)
        self.save_config()
