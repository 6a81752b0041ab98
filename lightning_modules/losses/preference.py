"""Preference losses: small objects on summed log-probabilities.

Shapes: B rows, K answers a row; answer 0 is chosen, the others are rejected. With several rejected answers, pairwise
losses are averaged over the pairs of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.losses.described import Described


class PreferenceOutput(NamedTuple):
    """What a preference loss returns.

    Attributes:
        losses: ``(B,)`` with gradient.
        rewards: ``(B, K)`` detached implicit rewards, ``beta`` times the log-ratio to the reference, in nats.
    """

    losses: Tensor
    rewards: Tensor


class PreferenceLoss(Described, ABC):
    """A loss on log-ratios between policy and reference.

    Args:
        beta: Inverse temperature of the implicit reward, the papers' beta, > 0.
        length_norm: Divide log-probabilities by the answers' lengths in tokens.

    Raises:
        ValueError: If ``beta`` <= 0.
    """

    def __init__(self, beta: float = 0.1, length_norm: bool = False) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        self.beta = beta
        self.length_norm = length_norm

    def forward(self, policy: Tensor, reference: Tensor, lengths: Tensor | None = None) -> PreferenceOutput:
        """Compute the losses.

        Args:
            policy: ``(B, K)`` summed log-probabilities under the policy, with gradient, K >= 2.
            reference: ``(B, K)`` the same under the frozen reference.
            lengths: ``(B, K)`` answer tokens; needed for ``length_norm``.
        """
        ratios = policy - reference.detach()
        if self.length_norm:
            if lengths is None:
                raise ValueError("length_norm needs the answers' lengths")
            ratios = ratios / lengths.clamp_min(1)
        return PreferenceOutput(self.losses(ratios), (self.beta * ratios).detach())

    @abstractmethod
    def losses(self, ratios: Tensor) -> Tensor:
        """Losses ``(B,)`` of log-ratios ``(B, K)``."""


class PairwiseLoss(PreferenceLoss):
    """A loss of the difference ``delta`` between chosen and rejected log-ratios, the mean over a row's pairs."""

    def losses(self, ratios: Tensor) -> Tensor:
        """Average :meth:`pair_losses` over the rejected answers."""
        return self.pair_losses(ratios[:, :1] - ratios[:, 1:]).mean(1)

    @abstractmethod
    def pair_losses(self, delta: Tensor) -> Tensor:
        """Loss of each pair, same shape as ``delta``."""


class Sigmoid(PairwiseLoss):
    """``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``; with ``eps > 0`` the conservative form.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the share of pairs assumed to be labelled the wrong way round, in [0, 1].
        length_norm: Divide log-probabilities by lengths.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290, Eq. 7; conservative form: E. Mitchell's note on cDPO.
    """

    def __init__(self, beta: float = 0.1, smoothing: float = 0.0, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
        self.smoothing = smoothing

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Binary cross-entropy with logit ``beta delta`` and target ``1 - eps``."""
        logits = self.beta * delta
        return F.softplus(-logits) + self.smoothing * logits if self.smoothing else F.softplus(-logits)


class Robust(PairwiseLoss):
    """``[(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps)`` with the logistic ``l``: unbiased under label flips.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the rate of flipped labels, in [0, 0.5).
        length_norm: Divide log-probabilities by lengths.

    Source:
        Chowdhury et al. (2024), Provably Robust DPO, arXiv:2403.00409, Eq. 12.
    """

    def __init__(self, beta: float = 0.1, smoothing: float = 0.1, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"smoothing must lie in [0, 0.5), got {smoothing}")
        self.smoothing = smoothing

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Debiased logistic loss."""
        logits = self.beta * delta
        kept, flipped = F.softplus(-logits), F.softplus(logits)
        return ((1 - self.smoothing) * kept - self.smoothing * flipped) / (1 - 2 * self.smoothing)


class IPO(PairwiseLoss):
    """``(delta - 1 / (2 beta))^2``: regression of the margin, which a deterministic preference cannot drive to infinity.

    Source:
        Azar et al. (2024), A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.
        Differs: sums of log-probabilities unless ``length_norm``; TRL's ``ipo`` averages them over the tokens of an answer.
    """

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Squared distance to the target margin."""
        return (delta - 1 / (2 * self.beta)) ** 2


class Hinge(PairwiseLoss):
    """``max(0, 1 - beta delta)``.

    Source:
        Zhao et al. (2023), SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in Liu et al. (2024), RSO, arXiv:2309.06657.
    """

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Linear below a margin of one, zero above."""
        return torch.relu(1 - self.beta * delta)


class SDPO(PreferenceLoss):
    """``-log sigmoid(-log sum_j exp(beta (ratio_j - ratio_chosen)))`` over the rejected answers j.

    Source:
        Chen et al. (2024), On Softmax Direct Preference Optimization for Recommendation, arXiv:2406.09215, Eq. 8.
        Differs: the sum is a log-sum-exp, which does not overflow.
    """

    def losses(self, ratios: Tensor) -> Tensor:
        """Softmax loss of the chosen among all answers."""
        return F.softplus((self.beta * (ratios[:, 1:] - ratios[:, :1])).logsumexp(1))


class DMPO(PreferenceLoss):
    """``-log sigmoid(beta (ratio_chosen - mean_j ratio_j))`` over the rejected answers j.

    Source:
        Bai et al. (2024), Finetuning Large Language Model for Personalized Ranking, arXiv:2405.16127, Eq. 6.
    """

    def losses(self, ratios: Tensor) -> Tensor:
        """Logistic loss of the mean margin."""
        return F.softplus(-self.beta * (ratios[:, 0] - ratios[:, 1:].mean(1)))
