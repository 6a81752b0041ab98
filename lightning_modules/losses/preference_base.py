"""Base classes of preference losses.

Shapes: B rows, K answers of a row; answer 0 is chosen, the others are rejected. With several rejected answers, pairwise losses are averaged over the
pairs of a row.

To add a loss, subclass :class:`PairwiseLoss` and implement ``pair_losses``, or subclass :class:`PreferenceLoss` and implement ``losses``. A class in
a file of yours is selected by its path, e.g. ``class_path: my_losses.MyLoss``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from malleable.lightning_modules.serialization import SerializableModule


class PreferenceOutput(NamedTuple):
    """Output of a preference loss.

    Attributes:
        losses: ``(B,)`` with gradient.
        rewards: ``(B, K)`` detached implicit rewards, in nats.
        figures: Detached values ``(B,)`` to log, by name: the mean over rows, or the extreme value if a name ends in ``_min`` or ``_max``.
    """

    losses: Tensor
    rewards: Tensor
    figures: dict[str, Tensor]


class PreferenceInputs(NamedTuple):
    """Input of a preference loss.

    Attributes:
        policy: ``(B, K)`` log-probabilities under the policy, with gradient; summed over tokens, or their mean with ``length_norm``.
        reference: ``(B, K)`` log-probabilities under the frozen reference; ``None`` for a loss without reference.
        lengths: ``(B, K)`` number of tokens of each answer; ``None`` if unknown.
        exists: ``(B, K)`` bool, False for missing answers.
        smoothing: ``(B,)`` probability that the preference of a row is reversed; ``None``: the ``smoothing`` of the loss.
        real: ``(B,)`` bool, False for padding rows, which must not contribute to statistics.
        desirable: ``(B,)`` bool, whether answer 0 of an unpaired row is desirable; ``None``: rows are pairs.
        precision: Data type in which the model computed the log-probabilities, which bounds their rounding errors.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor | None
    exists: Tensor
    smoothing: Tensor | None
    real: Tensor
    desirable: Tensor | None
    precision: torch.dtype

    @property
    def ratios(self) -> Tensor:
        """Log-ratios of policy and reference, ``(B, K)``; without a reference, log-probabilities."""
        return self.policy if self.reference is None else self.policy - self.reference

    @property
    def delta(self) -> Tensor:
        """Log-ratio of the chosen answer minus that of each rejected answer, ``(B, K - 1)``."""
        ratios = self.ratios
        return ratios[:, :1] - ratios[:, 1:]

    def mean_of_rejected(self, values: Tensor) -> Tensor:
        """Average ``(B, K - 1)`` values over the rejected answers that exist, ``(B,)``."""
        return masked_mean(values, self.exists[:, 1:])


class PreferenceLoss(SerializableModule, ABC):
    """Base class of losses on log-probabilities of answers under a policy and a frozen reference.

    State is stored in float32 buffers, which are saved in checkpoints and remain float32 when the module is converted. It changes in training mode
    only. A loss whose state changes only in :meth:`end_of_step` uses the same state for all batches of an optimizer step, so that the result does
    not depend on the number of devices and of accumulated batches.

    Args:
        beta: Inverse temperature of the implicit reward (beta in the papers), > 0.
        length_norm: Divide log-probabilities by the number of tokens of the answers.

    Attributes:
        needs_reference: Whether the loss needs log-probabilities of a reference.
        needs_lengths: Whether the loss needs the numbers of tokens of the answers.
        uses_smoothing: Whether the loss accepts label smoothing for each row.
        unpaired: Whether the loss needs unpaired rows, with the field ``desirable``, instead of pairs.

    Raises:
        ValueError: If ``beta`` <= 0.
    """

    needs_reference: bool = True
    needs_lengths: bool = False
    uses_smoothing: bool = False
    unpaired: bool = False

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
        desirable: Tensor | None = None,
        precision: torch.dtype = torch.float32,
    ) -> PreferenceOutput:
        """Compute the losses.

        Args:
            policy: ``(B, K)`` summed log-probabilities under the policy, with gradient, K >= 2.
            reference: ``(B, K)`` summed log-probabilities under the frozen reference; ``None`` for a loss without reference.
            lengths: ``(B, K)`` number of tokens of each answer; required with ``length_norm`` and by losses that need lengths. Rows with fewer than K
                answers have length 0 for the missing ones.
            smoothing: ``(B,)`` probability that the preference of a row is reversed; ``None``: the ``smoothing`` of the loss.
            real: ``(B,)`` bool, False for padding rows; ``None``: all rows are real. Used by losses whose state contains
                statistics of rows.
            desirable: ``(B,)`` bool, whether answer 0 of an unpaired row is desirable; ``None``: rows are pairs.
            precision: Data type in which the model computed the log-probabilities.

        Returns:
            Losses ``(B,)``, rewards ``(B, K)``, and values to log.

        Raises:
            ValueError: If a required argument is missing, or if an argument is given that the loss does not use.
        """
        name = type(self).__name__
        if self.needs_reference and reference is None:
            raise ValueError(f"{name} needs log-probabilities of a reference; pass reference=...")
        if not self.needs_reference and reference is not None:
            raise ValueError(f"{name} does not use a reference; omit reference=... (and the callback ReferenceCache)")
        if smoothing is not None and not self.uses_smoothing:
            raise ValueError(f"{name} does not accept a smoothing for each row; use a pairwise loss such as Sigmoid, or omit it in the batch")
        if (self.length_norm or self.needs_lengths) and lengths is None:
            raise ValueError(f"{'length_norm' if self.length_norm else name} needs the lengths of the answers; pass lengths=...")
        if self.unpaired and desirable is None:
            raise ValueError(f"{name} needs unpaired rows, which say whether an answer is desirable; use a loss of pairs, such as Sigmoid")
        if not self.unpaired and desirable is not None:
            raise ValueError(f"{name} needs pairs of answers, got unpaired rows (with the field 'desirable'); use KTO")
        if reference is not None:
            reference = reference.detach()
        if self.length_norm and lengths is not None:
            count = lengths.clamp_min(1)
            policy, reference = policy / count, None if reference is None else reference / count
        exists = torch.ones_like(policy, dtype=torch.bool) if lengths is None else lengths > 0
        real = torch.ones_like(exists[:, 0]) if real is None else real
        rows = PreferenceInputs(policy, reference, lengths, exists, smoothing, real, desirable, precision)
        losses = self.losses(rows)
        with torch.no_grad():
            return PreferenceOutput(losses, self.rewards(rows).detach(), self.figures(rows))

    @abstractmethod
    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Compute the loss of each row, ``(B,)``. In training mode, statistics of the rows may be collected."""

    def rewards(self, rows: PreferenceInputs) -> Tensor:
        """Return the implicit rewards of the answers, ``(B, K)``: ``beta`` times the log-ratios."""
        return self.beta * rows.ratios

    def figures(self, rows: PreferenceInputs) -> dict[str, Tensor]:
        """Return further values to log, as in :class:`PreferenceOutput`; called after :meth:`losses`, without gradient."""
        return {}

    def end_of_step(self) -> None:
        """Update the state after an optimizer step; called by the module on all ranks."""

    def reset(self) -> None:
        """Reset the state, e.g. when the reference changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to another device, but do not change their dtype."""
        before = [(module, name, buffer) for module in self.modules() for name, buffer in module._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in before:
            moved = module._buffers[name]
            if buffer is not None and moved is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(moved.device)
        return self


class PairwiseLoss(PreferenceLoss):
    """Base class of losses of the difference ``delta`` of chosen and rejected log-ratios, averaged over the pairs of a row.

    With label smoothing eps, the loss is ``(1 - eps) l(delta) + eps l(-delta)``.
    """

    uses_smoothing = True

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Average the losses of pairs over the rejected answers of a row that exist, ``(B,)``."""
        pairs = self.pair_losses(rows.delta)
        if rows.smoothing is not None:
            eps = rows.smoothing[:, None]
            pairs = (1 - eps) * pairs + eps * self.pair_losses(-rows.delta)
        return rows.mean_of_rejected(pairs)

    @abstractmethod
    def pair_losses(self, delta: Tensor) -> Tensor:
        """Compute the loss of each pair, of the shape of ``delta``, ``(B, K - 1)``."""


class LogisticLoss(PreferenceLoss):
    """Base class of losses ``-(1 - eps) log sigmoid(z) - eps log sigmoid(-z)`` of a logit z for each pair, averaged over the pairs of a row.

    Args:
        beta: Inverse temperature.
        smoothing: eps, the assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.
        length_norm: Divide log-probabilities by lengths.
    """

    uses_smoothing = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.0, length_norm: bool = False) -> None:
        super().__init__(beta, length_norm)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
        self.smoothing = float(smoothing)

    @abstractmethod
    def logits(self, rows: PreferenceInputs) -> Tensor:
        """Compute the logit of each pair, ``(B, K - 1)``."""

    def losses(self, rows: PreferenceInputs) -> Tensor:
        """Average the losses of pairs over the rejected answers of a row that exist, ``(B,)``."""
        return rows.mean_of_rejected(self.logistic(self.logits(rows), rows.smoothing))

    def logistic(self, logits: Tensor, smoothing: Tensor | None) -> Tensor:
        """Compute the binary cross-entropy with target ``1 - eps``, of the shape of ``logits``, ``(B, K - 1)``."""
        eps: Any = self.smoothing if smoothing is None else smoothing[:, None]
        return F.softplus(-logits) if isinstance(eps, float) and eps == 0 else F.softplus(-logits) + eps * logits


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean of each row of ``values``, ``(B, N)``, over the entries where ``mask`` is true, ``(B,)``; 0 for rows without such entries."""
    mean: Tensor = torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp_min(1)
    return mean
