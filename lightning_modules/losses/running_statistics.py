"""Moving averages of mean and standard deviation of values of training rows, equal for any number of devices and accumulated batches.

Shapes: P values of a batch, U updates since the last reset.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.ranks import stack_over_ranks


class RunningStatistics(nn.Module):
    """Exponential moving averages of the mean and the unbiased standard deviation.

    :meth:`collect` merges the values of batches, and :meth:`update` adds the statistics of all collected values to the averages. If values are
    collected over the batches of an optimizer step, and :meth:`update` is called at its end, the result does not depend on how the rows are
    distributed over batches and ranks.

    Args:
        decay: Weight of the previous averages, in [0, 1); 0 keeps the last statistics only.
        correct_bias: Divide the averages, which start at 0, by ``1 - decay^U``, as in Adam.
        over_ranks: Merge the values of all ranks; otherwise each rank has its own averages.
        skip: Number of first updates that are not added to the averages.
        least: Number of values that an update needs; with fewer values, nothing changes. 2 if the standard deviation is used.

    Attributes:
        average: ``(2,)`` float32, moving averages of mean and standard deviation, without correction.
        updates: ``()`` float32, U, negative while updates are skipped.

    Raises:
        ValueError: If ``decay`` is not in [0, 1).
    """

    average: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.9, *, correct_bias: bool = True, over_ranks: bool = True, skip: int = 0, least: int = 1) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.correct_bias = correct_bias
        self.over_ranks = over_ranks
        self.skip = skip
        self.least = least
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("updates", torch.tensor(-float(skip)))
        self._collected: list[Tensor] = []

    def collect(self, values: Tensor, mask: Tensor) -> None:
        """Add the ``values`` where ``mask`` is true, both of shape ``(P,)``, to those of the next update."""
        values = values.detach().float()
        # A single value that is not finite would remain in the averages.
        mask = mask & values.isfinite()
        count = mask.sum()
        mean = torch.where(mask, values, 0).sum() / count.clamp_min(1)
        squares = torch.where(mask, values - mean, 0).square().sum()
        self._collected.append(torch.stack([count.float(), mean, squares]))

    def update(self) -> None:
        """Add the statistics of the collected values to the averages; collective if ``over_ranks``. Without any value, nothing changes."""
        if not self._collected:
            return
        parts = torch.stack(self._collected)
        self._collected = []
        merged = _merge(parts)
        if self.over_ranks:
            merged = _merge(stack_over_ranks(merged))
        count, mean, squares = merged.unbind()
        # The unbiased variance of a single value is undefined.
        std = (squares / (count - 1).clamp_min(1)).sqrt()
        statistics = torch.stack([mean, std]).to(self.average)
        # The standard deviation of a single value is unknown; losses that need only the mean accept it.
        step = (count >= self.least).to(self.updates)
        counted = step * (self.updates >= 0)
        self.average.lerp_(statistics, counted * (1 - self.decay))
        self.updates += step

    def current(self) -> tuple[Tensor, Tensor]:
        """Return the averages of mean and standard deviation, scalars; 0 before the first update that counts."""
        average = self.average
        if self.correct_bias:
            average = average / (1 - self.decay ** self.updates.clamp_min(0)).clamp_min(1e-12)
        return average[0], average[1]

    def reset(self) -> None:
        """Forget all values."""
        self.average.zero_()
        self.updates.fill_(-float(self.skip))
        self._collected = []


def _merge(parts: Tensor) -> Tensor:
    """Merge counts, means and sums of squared deviations of several sets of values, ``(N, 3)``, to those of their union, ``(3,)``."""
    count = parts[:, 0].sum()
    share = parts[:, 0] / count.clamp_min(1)
    mean = share @ parts[:, 1]
    squares = parts[:, 2].sum() + parts[:, 0] @ (parts[:, 1] - mean) ** 2
    return torch.stack([count, mean, squares])
