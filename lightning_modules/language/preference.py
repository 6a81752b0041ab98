"""Training step and evaluation of preference methods.

Shapes: B rows, K answers of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Batch, PackedBatch, PreferenceBatch
from malleable.lightning_modules.base import LossOutput, needs_weights
from malleable.lightning_modules.functional.language.logps import answer_token_logps
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.language.config import dropout_off
from malleable.lightning_modules.language.precision import compute_dtype
from malleable.lightning_modules.losses.preference_base import PreferenceLoss, masked_mean

if TYPE_CHECKING:
    from malleable.lightning_modules.language.language_model import LanguageModel


def preference_step(
    model: nn.Module, batch: PreferenceBatch, loss: PreferenceLoss, *, sft_weight: float = 0.0, shared_prompt: bool | None = None
) -> LossOutput:
    """Compute the loss of a preference batch.

    Dropout is disabled, as in the computation of the reference, so that policy and reference are equal at the start.

    Args:
        model: The policy.
        batch: Chosen and rejected answers with ``reference_logps``, which a loss without reference ignores; or unpaired rows.
        loss: The preference loss.
        sft_weight: Weight of the negative log-likelihood of the chosen answers, which is added to the loss: a mean over the chosen tokens of the
            optimizer step if the batch has ``num_step_tokens``, otherwise over those of the batch.
        shared_prompt: Compute a prompt once for all its answers; ``None``: if that is exact for the model and not slower.

    Raises:
        MisconfigurationException: If the batch has no reference log-probabilities, but the loss needs them; or if it has unpaired rows, but the loss
            needs pairs, or vice versa; or if it has unpaired rows, and ``sft_weight`` is not 0.
    """
    if batch.reference_logps is None and loss.needs_reference:
        raise MisconfigurationException(
            "the batch has no reference log-probabilities: add the callback ReferenceCache (SelfPlayLoop includes it), "
            "or yield PreferenceBatch(reference_logps=...) from your loader"
        )
    if loss.unpaired != (batch.desirable is not None):
        found, remedy = ("unpaired rows", "KTO") if batch.desirable is not None else ("pairs of answers", "Sigmoid")
        raise MisconfigurationException(f"{type(loss).__name__} cannot be trained on {found}: choose another loss, such as {remedy}, or other data")
    if sft_weight and batch.desirable is not None:
        raise MisconfigurationException("sft_weight would also increase the likelihood of undesirable answers of unpaired rows: set it to 0")
    with dropout_off(model):
        parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
        tokens = answer_token_logps(model, *parts, shared_prompt=shared_prompt, num_columns=batch.answer_columns)
    policy, lengths = tokens.sum(-1), batch.answer_mask.sum(-1)
    # A rejected answer that equals the chosen one gets the same value: a gradient from rounding errors would be amplified by Adam.
    same = ((batch.answer_ids == batch.answer_ids[:, :1]) | ~batch.answer_mask).all(-1) & (lengths == lengths[:, :1])
    policy = torch.where(same, policy[:, :1], policy)
    reference = batch.reference_logps if loss.needs_reference else None
    if reference is not None:
        reference = torch.where(same, reference[:, :1], reference)
    # Padding rows do not count.
    real = batch.sample_id >= 0
    options = {"smoothing": batch.smoothing, "real": real, "desirable": batch.desirable}
    output = loss(policy, reference, lengths, precision=compute_dtype(model, policy.device), **options)
    rows = real.to(policy.dtype)
    weight = rows.sum()
    # The number of rows of the optimizer step gives each row the same weight in an incomplete step.
    total = (output.losses * rows).sum() / (weight.clamp_min(1) if batch.num_step_rows is None else batch.num_step_rows)
    if sft_weight:
        # The number of tokens of the optimizer step makes the loss independent of devices and accumulation.
        count = (lengths[:, 0] * rows).sum().clamp_min(1) if batch.num_step_tokens is None else batch.num_step_tokens
        total = total - sft_weight * (tokens[:, 0].sum(-1) * rows).sum() / count
    figures = answer_figures(policy.detach(), lengths, batch.desirable) | reward_figures(output.rewards, lengths > 0, batch.desirable)
    if reference is not None:
        figures |= {"reference_chosen": reference[:, 0], "reference_rejected": masked_mean(reference[:, 1:], lengths[:, 1:] > 0)}
    if loss.training:
        return LossOutput(total, reduce_rows(figures | output.figures, real), weight)
    # Extreme values cannot be accumulated over the batches of an evaluation.
    means = {name: values for name, values in output.figures.items() if not name.endswith(("_min", "_max"))}
    return LossOutput(total, reduce_rows(figures | means, real), weight)


class PreferenceTraining:
    """Mixin of language models that are trained with a preference loss. It must precede ``LanguageModel`` in the MRO.

    Attributes:
        loss: The preference loss.
        sft_weight: Weight of the negative log-likelihood of the chosen answers, which is added to the preference loss.
    """

    loss: PreferenceLoss
    sft_weight: float

    def set_loss(self, loss: PreferenceLoss, sft_weight: float) -> None:
        """Set the attributes.

        Raises:
            ValueError: If ``sft_weight`` < 0.
        """
        self.loss = loss
        self.sft_weight = sft_weight
        check_numbers(self, at_least={"sft_weight": 0})

    def end_of_step(self) -> None:
        """Update the state of the loss."""
        self.loss.end_of_step()

    def preference_loss(self, batch: PreferenceBatch) -> LossOutput:
        """Compute the preference loss."""
        module = cast("LanguageModel", self)
        return preference_step(module.model, batch, self.loss, sft_weight=self.sft_weight, shared_prompt=module.decoding.shared_prompt)

    @needs_weights
    def compute_loss(self, batch: PreferenceBatch | AnswerBatch | PackedBatch) -> LossOutput:
        """Compute the preference loss; in evaluation without rejected answers or reference, the negative log-likelihood of the true answers.

        Raises:
            MisconfigurationException: If the module is trained on rows without rejected answers.
        """
        module = cast("LanguageModel", self)
        measurable = module.training or batch_has_reference(batch) or not self.loss.needs_reference
        if isinstance(batch, PreferenceBatch) and measurable:
            return self.preference_loss(batch)
        if module.training:
            raise MisconfigurationException(
                f"{type(self).__name__} needs chosen and rejected answers, got {type(batch).__name__}: use PreferenceDataModule, or give each row "
                "several `answers`, the true one first, for example with RecommendationDataModule(negatives=Uniform())"
            )
        if isinstance(batch, PreferenceBatch):
            rank_zero_warn(
                "the rows of the evaluation have no reference log-probabilities: the loss is the negative log-likelihood of the chosen answers, and "
                "no rewards are measured; add the callback ReferenceCache to the training"
            )
        return module.answer_loss(batch)


def batch_has_reference(batch: object) -> bool:
    """Return whether a batch has log-probabilities of the reference."""
    return getattr(batch, "reference_logps", None) is not None


def evaluate_preferences(model: nn.Module, batch: PreferenceBatch, *, shared_prompt: bool | None = None) -> LossOutput:
    """Compute the negative log-likelihood per token of chosen or desirable answers, and which answers are more probable, without a reference.

    Args:
        model: The language model.
        batch: Chosen and rejected answers, or unpaired rows.
        shared_prompt: As in :func:`preference_step`.
    """
    parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
    policy = answer_token_logps(model, *parts, shared_prompt=shared_prompt, num_columns=batch.answer_columns).sum(-1)
    real, lengths = batch.sample_id >= 0, batch.answer_mask.sum(-1)
    good = real if batch.desirable is None else real & batch.desirable
    tokens = (lengths[:, 0] * good).sum()
    loss = -torch.where(good, policy[:, 0], 0).sum() / tokens.clamp_min(1)
    return LossOutput(loss, reduce_rows(answer_figures(policy, lengths, batch.desirable), real), tokens, real.sum())


def true_likelihood(output: LossOutput, batch: Batch) -> tuple[Tensor, Tensor | int | None]:
    """Return the mean negative log-likelihood of a token of the true answers, and the number of these tokens, in an evaluation."""
    if not isinstance(batch, PreferenceBatch):
        return output.loss, output.weight
    names = ("logps_chosen", "tokens_chosen") if batch.desirable is None else ("logps_desirable", "tokens_desirable")
    logps, tokens = (output.extras[name] for name in names)
    return -logps / tokens.clamp_min(1e-9), tokens * (batch.sample_id >= 0).sum()


def reward_figures(rewards: Tensor, exists: Tensor, desirable: Tensor | None = None) -> dict[str, Tensor]:
    """Return implicit rewards (``rewards_*``) of each row, ``(B,)``, by name.

    Args:
        rewards: ``(B, K)``.
        exists: ``(B, K)`` bool, False for missing answers.
        desirable: ``(B,)`` bool, whether answer 0 of an unpaired row is desirable; the margin is then the reward of answer 0, negative if it is not.
    """
    first, others = rewards[:, 0], exists[:, 1:]
    if desirable is not None:
        margin = torch.where(desirable, first, -first)
        return {"rewards_margins": margin, "rewards_accuracies": (margin > 0).to(first)}
    margins = first[:, None] - rewards[:, 1:]
    return {
        "rewards_chosen": first,
        "rewards_rejected": masked_mean(rewards[:, 1:], others),
        "rewards_margins": masked_mean(margins, others),
        "rewards_accuracies": masked_mean((margins > 0).to(first), others),
    }


def answer_figures(policy: Tensor, lengths: Tensor, desirable: Tensor | None = None) -> dict[str, Tensor]:
    """Return log-probabilities (``logps_*``) and lengths of answers of each row, ``(B,)``, by name.

    ``logps_accuracies`` is the share of rejected answers that are less probable than the chosen one; ``mean_logps_accuracies`` compares mean
    log-probabilities per token.

    Args:
        policy: ``(B, K)`` summed log-probabilities.
        lengths: ``(B, K)`` number of tokens, 0 for missing answers.
        desirable: ``(B,)`` bool for unpaired rows, whose answer 1 is not an answer to the prompt.
    """
    first, others = policy[:, 0], lengths[:, 1:] > 0
    if desirable is not None:
        tokens = lengths[:, 0].to(first)
        # Means over all rows, of which those of undesirable answers are 0: their ratio is the mean per token of desirable answers.
        parts = {"logps_desirable": torch.where(desirable, first, 0), "tokens_desirable": torch.where(desirable, tokens, 0)}
        return {"logps": first, "tokens": tokens, **parts}
    means = policy / lengths.clamp_min(1)
    return {
        "logps_chosen": first,
        "logps_rejected": masked_mean(policy[:, 1:], others),
        "logps_accuracies": masked_mean((first[:, None] > policy[:, 1:]).to(first), others),
        "mean_logps_accuracies": masked_mean((means[:, :1] > means[:, 1:]).to(first), others),
        "tokens_chosen": lengths[:, 0].to(first),
        "tokens_rejected": masked_mean(lengths[:, 1:].to(first), others),
    }


def reduce_rows(figures: dict[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    """Reduce values of rows to scalars over real rows: the mean, or the extreme value if a name ends in ``_min`` or ``_max``.

    Args:
        figures: Values ``(B,)``, by name.
        real: ``(B,)`` bool, False for padding rows.
    """
    count = real.sum().clamp_min(1)
    reduced = {}
    for name, values in figures.items():
        if name.endswith("_min"):
            reduced[name] = values.masked_fill(~real, torch.inf).amin()
        elif name.endswith("_max"):
            reduced[name] = values.masked_fill(~real, -torch.inf).amax()
        else:
            reduced[name] = torch.where(real, values, 0).sum() / count
    return reduced
