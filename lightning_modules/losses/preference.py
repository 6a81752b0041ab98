"""Preference losses on summed log-probabilities of answers.

Shapes: B rows, K answers of a row; answer 0 is chosen, the others are rejected. With several rejected answers, pairwise losses are averaged over the
pairs of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.serialization import SerializableModule


class PreferenceOutput(NamedTuple):
    """Output of a preference loss.

    Attributes:
        losses: ``(B,)`` with gradient.
        rewards: ``(B, K)`` detached implicit rewards, ``beta`` times the log-ratio to the reference, in nats.
    """

    losses: Tensor
    rewards: Tensor


class PreferenceLoss(SerializableModule, ABC):
    """Base class of losses on log-ratios between policy and reference.

    State is stored in float32 buffers, which are saved in checkpoints and remain float32 when the module is converted. It changes only in
    :meth:`end_of_step`, so that all batches of an optimizer step use the same state.

    Args:
        beta: Inverse temperature of the implicit reward (beta in the papers), > 0.
        length_norm: Divide log-probabilities by the number of tokens of the answers.

    Attributes:
        needs_reference: Whether the loss needs log-probabilities of a reference.
        uses_smoothing: Whether the loss accepts label smoothing for each row.

    Raises:
        ValueError: If ``beta`` <= 0.
    """

    needs_reference: ClassVar[bool] = True
    uses_smoothing: ClassVar[bool] = False

    def __init__(self, beta: float = 0.1, length_norm: bool = False) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        self.beta = beta
        self.length_norm = length_norm

    def forward(
        self,
        policy: Tensor,
        reference: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        smoothing: Tensor | None = None,
        real: Tensor | None = None,
    ) -> PreferenceOutput:
        """Compute the losses.

        Args:
            policy: ``(B, K)`` summed log-probabilities under the policy, with gradient, K >= 2.
            reference: ``(B, K)`` summed log-probabilities under the frozen reference; ``None`` for a loss without reference.
            lengths: ``(B, K)`` number of tokens of each answer; required with ``length_norm``. Rows with fewer than K answers have length 0 for the
                missing ones.
            smoothing: ``(B,)`` probability that the preference of a row is reversed; ``None``: the ``smoothing`` of the loss.
            real: ``(B,)`` bool, False for padding rows; ``None``: all rows are real. Used by losses whose state contains
                statistics of rows.

        Returns:
            Losses ``(B,)`` and rewards ``(B, K)``.

        Raises:
            ValueError: If a required argument is missing, or if ``smoothing`` is given to a loss that does not use it.
        """
        if self.needs_reference and reference is None:
            raise ValueError(f"{type(self).__name__} needs log-probabilities of a reference; pass reference=...")
        if smoothing is not None and not self.uses_smoothing:
            raise ValueError(f"{type(self).__name__} does not accept a smoothing for each row; use Sigmoid or Robust, or omit it in the batch")
        if self.length_norm and lengths is None:
            raise ValueError("length_norm needs the lengths of the answers; pass lengths=...")
        ratios = policy if reference is None else policy - reference.detach()
        if self.length_norm and lengths is not None:
            ratios = ratios / lengths.clamp_min(1)
        exists = torch.ones_like(ratios, dtype=torch.bool) if lengths is None else lengths > 0
        losses = self.losses(ratios, exists, smoothing=smoothing, real=real)
        return PreferenceOutput(losses, (self.beta * ratios).detach())

    @abstractmethod
    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Compute the losses ``(B,)``.

        Args:
            ratios: ``(B, K)`` log-ratios; without a reference, log-probabilities.
            exists: ``(B, K)`` bool, False for missing answers.
            smoothing: As in :meth:`forward`.
            real: As in :meth:`forward`.
        """

    def end_of_step(self) -> None:
        """Update the state after an optimizer step; called by the module."""

    def reset(self) -> None:
        """Reset the state, e.g. at the start of a training phase."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to another device, but do not change their dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(moved.device)
        return self


class PairwiseLoss(PreferenceLoss):
    """Base class of losses of the difference ``delta`` of chosen and rejected log-ratios, averaged over the pairs of a row."""

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Average :meth:`pair_losses` over the rejected answers of a row that exist, ``(B,)``."""
        pairs = self.pair_losses(ratios[:, :1] - ratios[:, 1:], None if smoothing is None else smoothing[:, None])
        return masked_mean(pairs, exists[:, 1:])

    @abstractmethod
    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Compute the loss of each pair, of the shape of ``delta``, ``(B, K - 1)``; ``smoothing`` is ``(B, 1)``."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean of each row of ``values``, ``(B, N)``, over the entries where ``mask`` is true, ``(B,)``; 0 for rows without such entries."""
    mean: Tensor = torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp_min(1)
    return mean


class Sigmoid(PairwiseLoss):
    """DPO loss, ``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``; conservative DPO for ``eps > 0``.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.
        length_norm: Divide log-probabilities by lengths.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290, Eq. 7; conservative form: E. Mitchell's note on cDPO.
    """

    uses_smoothing = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.0, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
        self.smoothing = float(smoothing)

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Compute the binary cross-entropy with logit ``beta delta`` and target ``1 - eps``, ``(B, K - 1)``."""
        logits = self.beta * delta
        eps = self.smoothing if smoothing is None else smoothing
        return F.softplus(-logits) if isinstance(eps, float) and eps == 0 else F.softplus(-logits) + eps * logits


class Robust(PairwiseLoss):
    """Robust DPO loss, ``[(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps)`` with the logistic loss ``l``; unbiased under flipped labels.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the rate of flipped labels, in [0, 0.5). ``smoothing`` of a batch overrides it.
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

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Compute the debiased logistic loss, ``(B, K - 1)``."""
        logits = self.beta * delta
        eps: Any = self.smoothing if smoothing is None else smoothing
        correct, flipped = F.softplus(-logits), F.softplus(logits)
        losses: Tensor = ((1 - eps) * correct - eps * flipped) / (1 - 2 * eps)
        return losses


class IPO(PairwiseLoss):
    """IPO loss, ``(delta - 1 / (2 beta))^2``: a regression of the margin, which stays finite for deterministic preferences.

    Source:
        Azar et al. (2024), A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.
        Differs from ``ipo`` of TRL, which averages log-probabilities over the tokens of an answer: here they are summed unless ``length_norm``.
    """

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Compute the squared difference of ``delta`` from the target margin, ``(B, K - 1)``."""
        return (delta - 1 / (2 * self.beta)) ** 2


class Hinge(PairwiseLoss):
    """Hinge loss, ``max(0, 1 - beta delta)``.

    Source:
        Zhao et al. (2023), SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in Liu et al. (2024), RSO, arXiv:2309.06657.
    """

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Compute ``max(0, 1 - beta delta)``, ``(B, K - 1)``."""
        return torch.relu(1 - self.beta * delta)


class SDPO(PreferenceLoss):
    """Softmax-DPO loss, ``-log sigmoid(-log sum_j exp(beta (ratio_j - ratio_chosen)))`` over the rejected answers j.

    Source:
        Chen et al. (2024), On Softmax Direct Preference Optimization for Recommendation, arXiv:2406.09215, Eq. 8.
        Differs: computed with log-sum-exp, which does not overflow.
    """

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Compute the softmax loss of the chosen answer among all answers, ``(B,)``."""
        margins = self.beta * (ratios[:, 1:] - ratios[:, :1])
        return F.softplus(margins.masked_fill(~exists[:, 1:], -torch.inf).logsumexp(1))


class DMPO(PreferenceLoss):
    """DMPO loss, ``-log sigmoid(beta (ratio_chosen - mean_j ratio_j))`` over the rejected answers j.

    Source:
        Bai et al. (2024), Finetuning Large Language Model for Personalized Ranking, arXiv:2405.16127, Eq. 6.
    """

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Compute the logistic loss of the mean margin, ``(B,)``."""
        return F.softplus(-self.beta * (ratios[:, 0] - masked_mean(ratios[:, 1:], exists[:, 1:])))
