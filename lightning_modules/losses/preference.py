"""Preference losses of pairs, and of a chosen answer among several rejected ones, on log-probabilities of answers.

Shapes: B rows, K answers of a row; answer 0 is chosen, the others are rejected. ``delta`` is the log-ratio of policy and reference of the chosen
answer minus that of a rejected one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.losses.preference_base import LogisticLoss, PairwiseLoss, PreferenceInputs, PreferenceLoss

MAX_RATE = 0.45
"""Largest rate of flipped labels of a row in :class:`Robust`."""


class Sigmoid(LogisticLoss):
    """DPO loss, ``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``; conservative DPO for ``eps > 0``.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.
        length_norm: Divide log-probabilities by lengths.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290, Eq. 7; conservative form: E. Mitchell's note on cDPO.
    """

    def logits(self, rows: PreferenceInputs) -> Tensor:
        """Return ``beta delta``, ``(B, K - 1)``."""
        return self.beta * rows.delta


class RDPO(LogisticLoss):
    """R-DPO loss: the DPO loss with logit ``beta delta + alpha (|y_w| - |y_l|)``, which weights pairs whose chosen answer is longer less.

    Args:
        beta: Inverse temperature.
        alpha: Weight of the difference of lengths in tokens, >= 0.
        smoothing: eps, the assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.

    Source:
        Park et al. (2024), Disentangling Length from Quality in Direct Preference Optimization, arXiv:2403.19159, Eq. 9.
    """

    needs_lengths = True

    def __init__(self, beta: float = 0.1, alpha: float = 0.05, smoothing: float = 0.0) -> None:
        super().__init__(beta, smoothing)
        self.alpha = alpha
        check_numbers(self, at_least={"alpha": 0})

    def logits(self, rows: PreferenceInputs) -> Tensor:
        """Return ``beta delta + alpha (|y_w| - |y_l|)``, ``(B, K - 1)``."""
        assert rows.lengths is not None
        return self.beta * rows.delta + self.alpha * (rows.lengths[:, :1] - rows.lengths[:, 1:])


class CPO(LogisticLoss):
    """CPO loss, ``-log sigmoid(beta (log pi(y_w) - log pi(y_l)))`` without a reference, plus the negative log-likelihood of the chosen answer.

    Args:
        beta: Inverse temperature.
        nll_weight: Weight of the negative log-likelihood of the chosen answer per token, >= 0.
        smoothing: eps, the assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.

    Source:
        Xu et al. (2024), Contrastive Preference Optimization, arXiv:2401.08417, Eq. 3 to 5. Differs: the log-likelihood is a mean over tokens.
    """

    needs_reference = False
    needs_lengths = True

    def __init__(self, beta: float = 0.1, nll_weight: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__(beta, smoothing)
        self.nll_weight = nll_weight
        check_numbers(self, at_least={"nll_weight": 0})

    def logits(self, rows: PreferenceInputs) -> Tensor:
        """Return ``beta`` times the difference of log-probabilities, ``(B, K - 1)``."""
        return self.beta * rows.delta

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the logistic loss plus the weighted negative log-likelihood per token, ``(B,)``."""
        assert rows.lengths is not None
        return super().losses(rows) - self.nll_weight * rows.policy[:, 0] / rows.lengths[:, 0].clamp_min(1)


class ORPO(PreferenceLoss):
    """ORPO loss: the negative log-likelihood of the chosen answer minus ``beta log sigmoid`` of the log odds ratio.

    Odds are ``p / (1 - p)`` of the geometric mean p of the probabilities of the tokens of an answer. There is no reference.

    Args:
        beta: Weight of the odds-ratio term (lambda in the paper), > 0.

    Source:
        Hong et al. (2024), ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691, Eq. 6 and 7.
        Differs from TRL, whose negative log-likelihood includes the tokens of the prompt.
    """

    needs_reference = False
    needs_lengths = True

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta, length_norm=True)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the loss of each row, ``(B,)``."""
        return rows.mean_of_rejected(self.beta * F.softplus(-self.log_odds(rows))) - rows.policy[:, 0]

    @staticmethod
    def log_odds(rows: PreferenceInputs) -> Tensor:
        """Compute the log odds ratio of chosen and rejected answers, ``(B, K - 1)``."""
        # log(1 - p) is -inf for a certain answer.
        logps = rows.policy.clamp_max(-1e-7)
        odds = logps - torch.log(-torch.expm1(logps))
        return odds[:, :1] - odds[:, 1:]

    def figures(self, rows: PreferenceInputs) -> dict[str, Tensor]:
        """Return the log odds ratio."""
        return {"log_odds": rows.mean_of_rejected(self.log_odds(rows))}


class Robust(PreferenceLoss):
    """Robust DPO loss, ``[(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps)`` with the logistic loss ``l``; unbiased under flipped labels.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the rate of flipped labels, in [0, 0.5). ``smoothing`` of a batch overrides it; values above 0.45 count as 0.45.
        length_norm: Divide log-probabilities by lengths.

    Source:
        Chowdhury et al. (2024), Provably Robust DPO, arXiv:2403.00409, Eq. 12.
    """

    uses_smoothing = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.1, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"smoothing must be in [0, 0.5), got {smoothing}")
        self.smoothing = float(smoothing)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Average the debiased logistic loss over the pairs of a row, ``(B,)``."""
        logits = self.beta * rows.delta
        # The loss is infinite for 0.5.
        eps: Any = self.smoothing if rows.smoothing is None else rows.smoothing[:, None].clamp_max(MAX_RATE)
        correct, flipped = F.softplus(-logits), F.softplus(logits)
        return rows.mean_of_rejected(((1 - eps) * correct - eps * flipped) / (1 - 2 * eps))


class ExoPair(PreferenceLoss):
    """EXO loss of pairs: the divergence ``KL(q || p)`` of ``q = sigmoid(+-beta delta)`` from the smoothed label ``p = (1 - eps, eps)``.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the share of reversed labels, in (0, 0.5]; the loss is infinite for 0.

    Source:
        Ji et al. (2024), Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856, Eq. 16.
    """

    def __init__(self, beta: float = 0.1, smoothing: float = 1e-3) -> None:
        super().__init__(beta)
        if not 0 < smoothing <= 0.5:
            raise ValueError(f"smoothing must be in (0, 0.5], got {smoothing}")
        self.smoothing = float(smoothing)

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Average the divergence over the pairs of a row, ``(B,)``."""
        logits = self.beta * rows.delta
        chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-self.smoothing))
        rejected = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(self.smoothing))
        return rows.mean_of_rejected(chosen + rejected)


class IPO(PairwiseLoss):
    """IPO loss, ``(delta - 1 / (2 beta))^2``: a regression of the margin, which stays finite for deterministic preferences.

    Source:
        Azar et al. (2024), A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.
        Differs from ``ipo`` of TRL, which averages log-probabilities over the tokens of an answer: here they are summed unless ``length_norm``.
    """

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Compute the squared difference of ``delta`` from the target margin, ``(B, K - 1)``."""
        return (delta - 1 / (2 * self.beta)) ** 2


class Hinge(PairwiseLoss):
    """Hinge loss, ``max(0, 1 - beta delta)``.

    Source:
        Zhao et al. (2023), SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in Liu et al. (2024), RSO, arXiv:2309.06657.
    """

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Compute ``max(0, 1 - beta delta)``, ``(B, K - 1)``."""
        return torch.relu(1 - self.beta * delta)


class Discopop(PairwiseLoss):
    """DiscoPOP loss: a mixture of the logistic and the exponential loss of ``z = beta delta``, with weight ``sigmoid(z / tau)`` of the latter.

    Args:
        beta: Inverse temperature.
        tau: Temperature of the weight, > 0.

    Source:
        Lu et al. (2024), Discovering Preference Optimization Algorithms with and for Large Language Models, arXiv:2406.08414, Eq. 5.
    """

    def __init__(self, beta: float = 0.1, tau: float = 0.05) -> None:
        super().__init__(beta)
        self.tau = tau
        check_numbers(self, above={"tau": 0})

    def pair_losses(self, delta: Tensor) -> Tensor:
        """Compute the mixture, ``(B, K - 1)``."""
        logits = self.beta * delta
        # As one exponential, the product of weight and exponential loss does not become inf * 0.
        exponential = (F.logsigmoid(logits / self.tau) - logits).exp()
        return F.softplus(-logits) * (-logits / self.tau).sigmoid() + exponential


class SoftmaxDPO(PreferenceLoss):
    """Softmax-DPO (S-DPO) loss, ``-log sigmoid(-log sum_j exp(beta (ratio_j - ratio_chosen)))`` over the rejected answers j.

    Source:
        Chen et al. (2024), On Softmax Direct Preference Optimization for Recommendation, arXiv:2406.09215, Eq. 8.
        Differs: computed with log-sum-exp, which does not overflow.
    """

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the softmax loss of the chosen answer among all answers, ``(B,)``."""
        margins = -self.beta * rows.delta
        return F.softplus(margins.masked_fill(~rows.exists[:, 1:], -torch.inf).logsumexp(1))


class DMPO(PreferenceLoss):
    """DMPO loss, ``-log sigmoid(beta (ratio_chosen - mean_j ratio_j))`` over the rejected answers j.

    Source:
        Bai et al. (2024), Finetuning Large Language Model for Personalized Ranking, arXiv:2405.16127, Eq. 6.
    """

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the logistic loss of the mean margin, ``(B,)``."""
        ratios = rows.ratios
        return F.softplus(-self.beta * (ratios[:, 0] - rows.mean_of_rejected(ratios[:, 1:])))
