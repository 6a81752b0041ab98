"""Length-normalised preference losses with a target margin: the alpha-DPO loss, whose margin adapts to each pair, and SimPO.

Shapes: B rows, K answers of a row; answer 0 is chosen, the others are rejected.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.losses.preference_base import LogisticLoss, PreferenceInputs, masked_mean
from malleable.lightning_modules.losses.running_statistics import RunningStatistics

Scale = Literal["log_ratio", "reward"]
Mode = Literal["ema", "batch"]
Update = Literal["optimizer_step", "micro_batch"]
Scope = Literal["global", "rank"]
Compat = Literal["none", "official"]

SMALLEST_STD = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Smallest meaningful standard deviation of gaps by the data type of the model: 40 times the one of equal policy and reference in float32."""
SMALLEST_STD_HALF = 2e-3
"""The same in bfloat16 and float16: 10 times the one of equal policy and reference in bfloat16."""


class AdaptiveMargin(LogisticLoss):
    """alpha-DPO loss, ``-log sigmoid(beta (delta - m))`` with the margin ``m = gamma / beta + alpha z`` of each pair.

    ``delta`` is the difference of the mean log-probabilities per token of the chosen and the rejected answer under the policy. ``z`` is the
    standardised gap ``g = delta - delta_ref`` between policy and reference. A pair that the policy separates more than others, relative to the
    reference, gets a larger margin. Margins have no gradient. With ``alpha=0`` the loss is :class:`SimPO`, and needs no reference.

    The statistics of g that standardise it are state of the loss. By default, they are moving averages over optimizer steps, with bias correction;
    the values of a step are used from the next step on, and those of the first step are left out, because policy and reference are then equal. z is 0
    as long as there are no statistics, or if the standard deviation is less than ``stat_min_std``. Evaluation does not change the statistics.

    Args:
        beta: Scale of the reward, > 0.
        gamma_beta_ratio: ``gamma / beta``, the margin without adaptation, in nats per token, >= 0.
        alpha: Change of the margin by one standard deviation of g, >= 0; 0 is SimPO.
        alpha_scale: ``log_ratio``: ``alpha`` is a change of the log-ratio ``delta``, as in the authors' code and their published values;
            ``reward``: of the reward ``beta delta``, as in the paper's equation. For the same loss, set ``alpha`` to ``beta`` times the value of
            ``log_ratio``.
        length_norm: Use mean log-probabilities per token, instead of sums over tokens.
        smoothing: Assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.
        stat_mode: ``ema``: moving averages; ``batch``: statistics of the batch itself, over all ranks.
        stat_decay: Weight of the previous averages, in [0, 1).
        stat_bias_correction: Correct averages for their start at 0.
        stat_update: ``optimizer_step``, or ``micro_batch``: update the averages before each batch is used. The result then depends on the number of
            devices and of accumulated batches.
        stat_min_std: Standard deviation of g below which z is 0, in nats per token. Default: 1e-5, or 2e-3 for models in half precision.
        stat_scope: ``global``: statistics over all ranks; ``rank``: of the rows of the first rank only, without communication.
        z_clip: Largest absolute value of z; ``None``: no limit.
        compat: ``official``: statistics of the authors' code, which are updated in each micro-batch and start at 0 without bias correction.
            The first steps have extreme margins. Differs from that code: z is 0 instead of ``nan`` if the standard deviation is 0, evaluation does
            not change the averages, and they are stored in checkpoints.

    Raises:
        ValueError: If a value is out of range, or if ``compat="official"`` is combined with a setting of statistics that it overrides.

    Source:
        Wu et al. (2024), alpha-DPO: Adaptive Reward Margin is What Direct Preference Optimization Needs, arXiv:2410.10148.
        Differs in the statistics, as described above.
    """

    needs_lengths = True

    def __init__(
        self,
        beta: float = 2.0,
        gamma_beta_ratio: float = 0.25,
        alpha: float = 0.1,
        alpha_scale: Scale = "log_ratio",
        length_norm: bool = True,
        smoothing: float = 0.0,
        stat_mode: Mode = "ema",
        stat_decay: float = 0.9,
        stat_bias_correction: bool = True,
        stat_update: Update = "optimizer_step",
        stat_min_std: float | None = None,
        stat_scope: Scope = "global",
        z_clip: float | None = None,
        compat: Compat = "none",
    ) -> None:
        super().__init__(beta, smoothing, length_norm)
        for name, value, allowed in (
            ("alpha_scale", alpha_scale, Scale),
            ("stat_mode", stat_mode, Mode),
            ("stat_update", stat_update, Update),
            ("stat_scope", stat_scope, Scope),
            ("compat", compat, Compat),
        ):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        fixed = (stat_mode, stat_bias_correction, stat_update, stat_min_std, z_clip) != ("ema", True, "optimizer_step", None, None)
        if compat == "official" and fixed:
            raise ValueError(
                "compat='official' sets stat_mode, stat_bias_correction, stat_update, stat_min_std and z_clip: omit them, or set compat='none'"
            )
        self.gamma_beta_ratio = gamma_beta_ratio
        self.alpha = alpha
        self.alpha_scale = alpha_scale
        self.stat_mode = stat_mode
        self.stat_decay = stat_decay
        self.stat_bias_correction = stat_bias_correction
        self.stat_update = stat_update
        self.stat_min_std = stat_min_std
        self.stat_scope = stat_scope
        self.z_clip = z_clip
        self.compat = compat
        check_numbers(self, at_least={"gamma_beta_ratio": 0, "alpha": 0, "stat_min_std": 0}, above={"z_clip": 0})
        self.needs_reference = alpha > 0
        self._log_ratio_alpha = alpha if alpha_scale == "log_ratio" else alpha / beta
        official = compat == "official"
        self._every_batch = official or stat_update == "micro_batch" or stat_mode == "batch"
        self.statistics = RunningStatistics(
            0.0 if stat_mode == "batch" else stat_decay,
            correct_bias=stat_bias_correction and not official,
            over_ranks=stat_scope == "global",
            skip=0 if self._every_batch else 1,
            least=2,
        )

    def logits(self, rows: PreferenceInputs) -> Tensor:
        """Return ``beta (delta - m)``, ``(B, K - 1)``; in training mode, collect the gaps."""
        logits: Tensor = self.beta * (rows.policy[:, :1] - rows.policy[:, 1:] - self.margins(rows, collect=self.training))
        return logits

    @torch.no_grad()
    def margins(self, rows: PreferenceInputs, collect: bool = False) -> Any:
        """Return the margins ``gamma / beta + alpha z``, ``(B, K - 1)``, or a number for ``alpha=0``."""
        if self.alpha == 0:
            return self.gamma_beta_ratio
        gaps = rows.delta
        if collect:
            self.statistics.collect(gaps.flatten(), (rows.exists[:, 1:] & rows.real[:, None]).flatten())
            if self._every_batch:
                self.statistics.update()
        return self.gamma_beta_ratio + self._log_ratio_alpha * self.standardized(gaps, rows.precision)

    def standardized(self, gaps: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Return the standardised gaps z, of the shape of ``gaps``; 0 if the standard deviation is too small."""
        mean, std = self.statistics.current()
        smallest = SMALLEST_STD.get(precision, SMALLEST_STD_HALF) if self.stat_min_std is None else self.stat_min_std
        known = std > (0.0 if self.compat == "official" else smallest)
        z = torch.where(known, (gaps - mean) / torch.where(known, std, 1.0), 0.0)
        return z if self.z_clip is None else z.clamp(-self.z_clip, self.z_clip)

    def rewards(self, rows: PreferenceInputs) -> Tensor:
        """Return the implicit rewards ``beta [(1 - alpha) log pi + alpha log pi_ref]``, up to a constant of each prompt, ``(B, K)``.

        ``alpha`` is that of the scale ``log_ratio``.
        """
        if rows.reference is None:
            return self.beta * rows.policy
        return self.beta * torch.lerp(rows.policy, rows.reference, self._log_ratio_alpha)

    def figures(self, rows: PreferenceInputs) -> dict[str, Tensor]:
        """Return rewards margins of SimPO and DPO, the weight of the gradient, and statistics of margins and gaps."""
        exists = rows.exists[:, 1:]
        delta = rows.policy[:, :1] - rows.policy[:, 1:]
        margins = self.margins(rows)
        target = 1 - (self.smoothing if rows.smoothing is None else rows.smoothing[:, None])
        weight = (target - (self.beta * (delta - margins)).sigmoid()).abs()
        figures = {"margins_simpo": masked_mean(self.beta * delta, exists), "gradient_weight": masked_mean(weight, exists)}
        if self.alpha == 0:
            return figures
        z = self.standardized(rows.delta, rows.precision)
        mean, std = self.statistics.current()
        return figures | {
            "margins_dpo": masked_mean(self.beta * rows.delta, exists),
            "gap_accuracies": masked_mean((rows.delta > 0).to(z), exists),
            "gap_mean": mean.expand(len(z)),
            "gap_std": std.expand(len(z)),
            "gap_z": masked_mean(z.abs(), exists),
            "target_margin": masked_mean(margins, exists),
            "target_margin_min": margins.masked_fill(~exists, torch.inf).amin(1),
            "target_margin_max": margins.masked_fill(~exists, -torch.inf).amax(1),
        }

    def end_of_step(self) -> None:
        """Update the statistics from the rows of the optimizer step."""
        if not self._every_batch:
            self.statistics.update()

    def reset(self) -> None:
        """Forget the statistics."""
        self.statistics.reset()


class SimPO(AdaptiveMargin):
    """SimPO loss, ``-log sigmoid(beta delta - gamma)`` of the difference of mean log-probabilities per token, without a reference.

    Args:
        beta: Scale of the reward, > 0.
        gamma_beta_ratio: ``gamma / beta``, the target margin in nats per token, >= 0.
        smoothing: Assumed share of pairs with reversed labels, in [0, 1]. ``smoothing`` of a batch overrides it.

    Source:
        Meng, Xia, Chen (2024), SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734, Eq. 6.
    """

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.25, smoothing: float = 0.0) -> None:
        super().__init__(beta, gamma_beta_ratio, alpha=0.0, smoothing=smoothing)
