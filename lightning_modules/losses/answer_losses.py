"""Preference losses in which each answer has its own term, of pairs and of unpaired rows, on log-ratios of policy and reference.

Shapes: B rows, K answers of a row; answer 0 is chosen, the others are rejected. Terms of rejected answers are averaged over those of a row. r is the
implicit reward ``beta`` times the log-ratio.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.losses.preference_base import PreferenceInputs, PreferenceLoss
from malleable.lightning_modules.losses.running_statistics import RunningStatistics

Update = Literal["optimizer_step", "micro_batch"]


class AnswerwiseLoss(PreferenceLoss):
    """Base class of sums of a term of the chosen answer and the mean of terms of the rejected answers.

    Args:
        beta: Inverse temperature of the implicit reward, > 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Add the terms of chosen and rejected answers, ``(B,)``."""
        rewards = self.beta * rows.ratios
        return self.chosen(rewards[:, 0]) + rows.mean_of_rejected(self.rejected(rewards[:, 1:]))

    @abstractmethod
    def chosen(self, rewards: Tensor) -> Tensor:
        """Compute the terms of chosen answers from their rewards, ``(B,)``."""

    @abstractmethod
    def rejected(self, rewards: Tensor) -> Tensor:
        """Compute the terms of rejected answers from their rewards, ``(B, K - 1)``."""


class NCAPair(AnswerwiseLoss):
    """NCA loss of pairs, ``-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2``, which keeps the chosen answer probable.

    Source:
        Chen et al. (2024), Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369, Eq. 14 with two answers.
    """

    def chosen(self, rewards: Tensor) -> Tensor:
        """Return ``-log sigmoid(r) - log sigmoid(-r) / 2``."""
        return F.softplus(-rewards) + 0.5 * F.softplus(rewards)

    def rejected(self, rewards: Tensor) -> Tensor:
        """Return ``-log sigmoid(-r) / 2``."""
        return 0.5 * F.softplus(rewards)


class APOZero(AnswerwiseLoss):
    """APO-zero loss, ``1 - sigmoid(r_w) + sigmoid(r_l)``, for chosen answers that are better than those of the model.

    Source:
        D'Oosterlinck et al. (2024), Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266, Eq. 7.
    """

    def chosen(self, rewards: Tensor) -> Tensor:
        """Return ``1 - sigmoid(r)``."""
        return (-rewards).sigmoid()

    def rejected(self, rewards: Tensor) -> Tensor:
        """Return ``sigmoid(r)``."""
        return rewards.sigmoid()


class APODown(PreferenceLoss):
    """APO-down loss, ``sigmoid(r_w) + 1 - sigmoid(r_w - r_l)``, for chosen answers that are worse than those of the model.

    Args:
        beta: Inverse temperature of the implicit reward, > 0.

    Source:
        D'Oosterlinck et al. (2024), Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266, Eq. 8.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the loss of each row, ``(B,)``."""
        return (self.beta * rows.ratios[:, 0]).sigmoid() + rows.mean_of_rejected((-self.beta * rows.delta).sigmoid())


class SPPO(PreferenceLoss):
    """SPPO loss with certain preferences, ``(ratio_w - 1 / (2 beta))^2 + (ratio_l + 1 / (2 beta))^2`` of log-ratios.

    Args:
        beta: Inverse of the step size eta in the paper, > 0.

    Source:
        Wu et al. (2024), Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675, Eq. 4.7 with probabilities 1 and 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the squared errors of both log-ratios, ``(B,)``."""
        half = 0.5 / self.beta
        return (rows.ratios[:, 0] - half) ** 2 + rows.mean_of_rejected((rows.ratios[:, 1:] + half) ** 2)


class BCOPair(PreferenceLoss):
    """BCO loss of pairs, ``-log sigmoid(r_w - shift) - log sigmoid(shift - r_l)``: a classifier of chosen and rejected answers.

    The shift is the mean of the rewards of chosen and rejected answers, as a moving average over optimizer steps.

    Args:
        beta: Inverse temperature of the implicit reward, > 0.
        shift: ``running``: the moving average; ``none``: 0, as in TRL since 1.0.
        decay: Weight of the previous average, in [0, 1).

    Source:
        Jung et al. (2024), Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656, Eq. 10.
        Differs: the average is that of the steps before, so that it does not depend on devices and accumulation.
    """

    def __init__(self, beta: float = 0.1, shift: Literal["running", "none"] = "running", decay: float = 0.9) -> None:
        super().__init__(beta)
        if shift not in ("running", "none"):
            raise ValueError(f"shift must be running or none, got {shift!r}")
        self.shift = shift
        self.decay = decay
        self.statistics = RunningStatistics(decay)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the loss of each row, ``(B,)``; in training mode, collect the rewards."""
        rewards = self.beta * rows.ratios
        shift: Tensor | float = 0.0
        if self.shift == "running":
            shift = self.statistics.current()[0]
            if self.training:
                rejected = rows.mean_of_rejected(rewards[:, 1:])
                self.statistics.collect((rewards[:, 0] + rejected) / 2, rows.real)
        return F.softplus(shift - rewards[:, 0]) + rows.mean_of_rejected(F.softplus(rewards[:, 1:] - shift))

    def figures(self, rows: PreferenceInputs) -> dict[str, Tensor]:
        """Return the shift."""
        return {"reward_shift": self.statistics.current()[0].expand(len(rows.policy))} if self.shift == "running" else {}

    def end_of_step(self) -> None:
        """Update the moving average."""
        self.statistics.update()

    def reset(self) -> None:
        """Forget the moving average."""
        self.statistics.reset()


class KTO(PreferenceLoss):
    """KTO loss of unpaired rows: ``1 - sigmoid(r - z)`` of a desirable answer, ``1 - sigmoid(z - r)`` of an undesirable one.

    ``z = beta max(0, KL)`` is the estimated divergence of the policy from the reference: the mean log-ratio of answers of other rows, which are
    answer 1 of a row.

    Args:
        beta: Inverse temperature of the implicit reward, > 0.
        desirable_weight: Weight of desirable answers, > 0. Choose both weights so that the weighted numbers of both kinds are similar.
        undesirable_weight: Weight of undesirable answers, > 0.
        kl_update: ``optimizer_step``: the estimate of the step before, which does not depend on devices and accumulation; ``micro_batch``: of the
            batch itself, over all ranks, as published.

    Source:
        Ethayarajh et al. (2024), KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306, Eq. 7 and 8.
    """

    unpaired = True

    def __init__(
        self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, kl_update: Update = "optimizer_step"
    ) -> None:
        super().__init__(beta)
        if kl_update not in get_args(Update):
            raise ValueError(f"kl_update must be one of {', '.join(get_args(Update))}, got {kl_update!r}")
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.kl_update = kl_update
        check_numbers(self, above={"desirable_weight": 0, "undesirable_weight": 0})
        self.statistics = RunningStatistics(0.0)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the loss of each row, ``(B,)``; in training mode, collect the log-ratios of answers of other rows."""
        assert rows.desirable is not None
        if self.training:
            self.statistics.collect(rows.ratios[:, 1], rows.real & rows.exists[:, 1])
            if self.kl_update == "micro_batch":
                self.statistics.update()
        margin = torch.where(rows.desirable, 1.0, -1.0) * self.beta * (rows.ratios[:, 0] - self.divergence())
        return torch.where(rows.desirable, self.desirable_weight, self.undesirable_weight) * (-margin).sigmoid()

    def divergence(self) -> Tensor:
        """Return the estimated divergence of the policy from the reference, a scalar in nats."""
        return self.statistics.current()[0].clamp_min(0)

    def figures(self, rows: PreferenceInputs) -> dict[str, Tensor]:
        """Return the estimated divergence."""
        return {"kl": self.divergence().expand(len(rows.policy))}

    def end_of_step(self) -> None:
        """Update the estimate of the divergence."""
        if self.kl_update == "optimizer_step":
            self.statistics.update()

    def reset(self) -> None:
        """Forget the estimate."""
        self.statistics.reset()
