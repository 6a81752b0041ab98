"""Training step of preference methods.

Shapes: B rows, K answers of a row.
"""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from malleable.datamodules.batch import PreferenceBatch
from malleable.lightning_modules.base import LossOutput
from malleable.lightning_modules.functional.language.logps import answer_token_logps
from malleable.lightning_modules.language.config import dropout_off
from malleable.lightning_modules.losses.preference import PreferenceLoss, masked_mean


def preference_step(
    model: nn.Module, batch: PreferenceBatch, loss: PreferenceLoss, *, sft_weight: float = 0.0, shared_prompt: bool | None = None
) -> LossOutput:
    """Compute the loss of a preference batch.

    Dropout is disabled, as in the computation of the reference, so that policy and reference are equal at the start.

    Args:
        model: The policy.
        batch: Chosen and rejected answers with ``reference_logps``.
        loss: The preference loss.
        sft_weight: Weight of the negative log-likelihood per token of the chosen answers, which is added to the loss.
        shared_prompt: Compute a prompt once for all its answers; ``None``: if that is exact for the model and not slower.

    Raises:
        MisconfigurationException: If the batch has no reference log-probabilities, but the loss needs them.
    """
    if batch.reference_logps is None and loss.needs_reference:
        raise MisconfigurationException(
            "the batch has no reference log-probabilities: add the callback ReferenceCache (SelfPlayLoop includes it), "
            "or yield PreferenceBatch(reference_logps=...) from your loader"
        )
    with dropout_off(model):
        parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
        tokens = answer_token_logps(model, *parts, shared_prompt=shared_prompt, num_columns=batch.answer_columns)
    policy, lengths = tokens.sum(-1), batch.answer_mask.sum(-1)
    # A rejected answer that equals the chosen one gets the same value: a gradient from rounding errors would be amplified by Adam.
    same = ((batch.answer_ids == batch.answer_ids[:, :1]) | ~batch.answer_mask).all(-1) & (lengths == lengths[:, :1])
    policy = torch.where(same, policy[:, :1], policy)
    reference = None if batch.reference_logps is None else torch.where(same, batch.reference_logps[:, :1], batch.reference_logps)
    # Padding rows do not count.
    real = batch.sample_id >= 0
    output = loss(policy, reference, lengths, smoothing=batch.smoothing, real=real)
    rows = real.to(policy.dtype)
    weight = rows.sum()
    total = (output.losses * rows).sum() / weight.clamp_min(1)
    if sft_weight:
        total = total - sft_weight * (tokens[:, 0].sum(-1) * rows).sum() / (lengths[:, 0] * rows).sum().clamp_min(1)
    return LossOutput(total, preference_figures(policy.detach(), output.rewards, rows, lengths > 0), weight)


def preference_figures(policy: Tensor, rewards: Tensor, real: Tensor, exists: Tensor) -> dict[str, Tensor]:
    """Compute means over real rows of implicit rewards (``rewards_*``) and of log-probabilities (``logps_*``), by name.

    Args:
        policy: ``(B, K)`` log-probabilities.
        rewards: ``(B, K)``.
        real: ``(B,)``, 1 in real rows, 0 in padding rows.
        exists: ``(B, K)`` bool, False for missing answers.
    """
    chosen, rejected, others = rewards[:, 0], rewards[:, 1:], exists[:, 1:]
    figures = {
        "rewards_chosen": chosen,
        "rewards_rejected": masked_mean(rejected, others),
        "rewards_margins": masked_mean(chosen[:, None] - rejected, others),
        "rewards_accuracies": masked_mean((chosen[:, None] > rejected).float(), others),
        "logps_chosen": policy[:, 0],
        "logps_rejected": masked_mean(policy[:, 1:], others),
    }
    return {name: (values * real).sum() / real.sum().clamp_min(1) for name, values in figures.items()}
