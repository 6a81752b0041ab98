"""Preference losses: small objects on summed log-probabilities.

Shapes: B rows, K answers a row; answer 0 is chosen, the others are rejected. With several rejected answers, pairwise
losses are averaged over the pairs of a row.
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
    """What a preference loss returns.

    Attributes:
        losses: ``(B,)`` with gradient.
        rewards: ``(B, K)`` detached implicit rewards, ``beta`` times the log-ratio to the reference, in nats.
    """

    losses: Tensor
    rewards: Tensor


class PreferenceLoss(SerializableModule, ABC):
    """A loss on log-ratios between policy and reference.

    A loss with a state keeps it in float32 buffers, which are stored in checkpoints and stay float32 when the module is converted. It changes the
    state in :meth:`end_of_step` only, so that all batches of an optimizer step see the same one.

    Args:
        beta: Inverse temperature of the implicit reward, the papers' beta, > 0.
        length_norm: Divide log-probabilities by the answers' lengths in tokens.

    Attributes:
        needs_reference: Whether the loss compares with a reference.
        uses_smoothing: Whether it takes a smoothing of its own for each row.

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
            reference: ``(B, K)`` the same under the frozen reference; ``None`` for a loss without one.
            lengths: ``(B, K)`` answer tokens; needed for ``length_norm``. An answer of length 0 does not exist: rows may have fewer than K.
            smoothing: ``(B,)`` probability that a row is labelled the wrong way round; ``None`` takes the loss's own.
            real: ``(B,)`` bool, False in rows that only fill a batch; ``None``: all are real. For losses that keep statistics.

        Raises:
            ValueError: If an argument is missing that the loss needs, or given that it does not use.
        """
        if self.needs_reference and reference is None:
            raise ValueError(f"{type(self).__name__} compares with a reference: give its log-probabilities")
        if smoothing is not None and not self.uses_smoothing:
            raise ValueError(f"{type(self).__name__} takes no smoothing for single rows; use Sigmoid or Robust, or leave it out of the batch")
        if self.length_norm and lengths is None:
            raise ValueError("length_norm needs the answers' lengths")
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
            exists: ``(B, K)`` bool, False where a row has no such answer.
            smoothing: As in :meth:`forward`.
            real: As in :meth:`forward`.
        """

    def end_of_step(self) -> None:
        """Change the state after an optimizer step; called by the module."""

    def reset(self) -> None:
        """Forget the state, as at the start of a training phase."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to another device, but keep their dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.to(moved.device)
        return self


class PairwiseLoss(PreferenceLoss):
    """A loss of the difference ``delta`` between chosen and rejected log-ratios, the mean over a row's pairs."""

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Average :meth:`pair_losses` over the rejected answers that exist."""
        pairs = self.pair_losses(ratios[:, :1] - ratios[:, 1:], None if smoothing is None else smoothing[:, None])
        return masked_mean(pairs, exists[:, 1:])

    @abstractmethod
    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Loss of each pair, same shape as ``delta``; ``smoothing`` is ``(B, 1)``."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row of ``(B, N)`` over the entries that a mask names, ``(B,)``; 0 where there is none."""
    mean: Tensor = torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp_min(1)
    return mean


class Sigmoid(PairwiseLoss):
    """``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``; with ``eps > 0`` the conservative form.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the share of pairs assumed to be labelled the wrong way round, in [0, 1].
        length_norm: Divide log-probabilities by lengths.

    A batch with a ``smoothing`` of each row replaces the loss's own.

    Source:
        Rafailov et al. (2023), Direct Preference Optimization, arXiv:2305.18290, Eq. 7; conservative form: E. Mitchell's note on cDPO.
    """

    uses_smoothing = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.0, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
        self.smoothing = float(smoothing)

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Binary cross-entropy with logit ``beta delta`` and target ``1 - eps``."""
        logits = self.beta * delta
        eps = self.smoothing if smoothing is None else smoothing
        return F.softplus(-logits) if isinstance(eps, float) and eps == 0 else F.softplus(-logits) + eps * logits


class Robust(PairwiseLoss):
    """``[(1 - eps) l(delta) - eps l(-delta)] / (1 - 2 eps)`` with the logistic ``l``: unbiased under label flips.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the rate of flipped labels, in [0, 0.5).
        length_norm: Divide log-probabilities by lengths.

    Source:
        Chowdhury et al. (2024), Provably Robust DPO, arXiv:2403.00409, Eq. 12.
    """

    uses_smoothing = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.1, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"smoothing must lie in [0, 0.5), got {smoothing}")
        self.smoothing = float(smoothing)

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Debiased logistic loss."""
        logits = self.beta * delta
        eps: Any = self.smoothing if smoothing is None else smoothing
        kept, flipped = F.softplus(-logits), F.softplus(logits)
        losses: Tensor = ((1 - eps) * kept - eps * flipped) / (1 - 2 * eps)
        return losses


class IPO(PairwiseLoss):
    """``(delta - 1 / (2 beta))^2``: regression of the margin, which a deterministic preference cannot drive to infinity.

    Source:
        Azar et al. (2024), A General Theoretical Paradigm, arXiv:2310.12036, Eq. 17.
        Differs: sums of log-probabilities unless ``length_norm``; TRL's ``ipo`` averages them over the tokens of an answer.
    """

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Squared distance to the target margin."""
        return (delta - 1 / (2 * self.beta)) ** 2


class Hinge(PairwiseLoss):
    """``max(0, 1 - beta delta)``.

    Source:
        Zhao et al. (2023), SLiC-HF, arXiv:2305.10425, Eq. 1, on log-ratios as in Liu et al. (2024), RSO, arXiv:2309.06657.
    """

    def pair_losses(self, delta: Tensor, smoothing: Tensor | None = None) -> Tensor:
        """Linear below a margin of one, zero above."""
        return torch.relu(1 - self.beta * delta)


class SDPO(PreferenceLoss):
    """``-log sigmoid(-log sum_j exp(beta (ratio_j - ratio_chosen)))`` over the rejected answers j.

    Source:
        Chen et al. (2024), On Softmax Direct Preference Optimization for Recommendation, arXiv:2406.09215, Eq. 8.
        Differs: the sum is a log-sum-exp, which does not overflow.
    """

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Softmax loss of the chosen among all answers."""
        margins = self.beta * (ratios[:, 1:] - ratios[:, :1])
        return F.softplus(margins.masked_fill(~exists[:, 1:], -torch.inf).logsumexp(1))


class DMPO(PreferenceLoss):
    """``-log sigmoid(beta (ratio_chosen - mean_j ratio_j))`` over the rejected answers j.

    Source:
        Bai et al. (2024), Finetuning Large Language Model for Personalized Ranking, arXiv:2405.16127, Eq. 6.
    """

    def losses(self, ratios: Tensor, exists: Tensor, *, smoothing: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """Logistic loss of the mean margin."""
        return F.softplus(-self.beta * (ratios[:, 0] - masked_mean(ratios[:, 1:], exists[:, 1:])))
