"""EASE: a linear autoencoder in closed form."""

from __future__ import annotations

import logging
from typing import ClassVar

from torch import Tensor

from malleable.datamodules.batch import Catalog
from malleable.lightning_modules.functional.recommendation.ease import ease_weights
from malleable.lightning_modules.recommendation.baselines import ItemKNN

log = logging.getLogger(__name__)

ALL = 1 << 30  # number of last items, more than any history has


class EASE(ItemKNN):
    """Recommend items by a linear model of the items of the history, which is computed in closed form.

    score(j) = sum over the items i of the history of ``B[i, j]``. The weights ``B`` reconstruct the items of each user with the smallest squared
    error plus a penalty ``l2 |B|^2``. An item has no weight for itself.

    Args:
        catalog: The items. Default: taken from the data module.
        l2: Penalty, > 0; large values give weights near the numbers of common users.
        exclude_seen: Do not recommend items that the user has interacted with.
        ks: Cut-offs of the ranking metrics.

    Raises:
        ValueError: If ``l2`` is not positive.

    Source:
        Steck (2019), Embarrassingly Shallow Autoencoders for Sparse Data, arXiv:1905.03375.
        Differs: a history has the last ``split.sequence_length`` items.
    """

    weight_settings: ClassVar[tuple[str, ...]] = ("l2",)

    def __init__(self, catalog: Catalog | None = None, l2: float = 100.0, exclude_seen: bool = True, ks: tuple[int, ...] = (1, 5, 10)) -> None:
        super().__init__(catalog, ALL, exclude_seen, ks)
        if not l2 > 0:
            raise ValueError(f"l2 must be > 0, got {l2}")
        self.l2 = l2
        self.save_hyperparameters(ignore="catalog")

    def compare_items(self) -> Tensor:
        """Compute the weights ``B``, ``(N, N)``.

        If the rows are not whole histories without repeated items (``train_limit``, ``repeats: keep``), the counts may be no table of common users.
        Then a larger penalty is used.
        """
        l2 = self.l2
        while True:
            gram = self.pairs.float()
            gram += self.pairs.T
            gram.diagonal().copy_(self.counts)
            try:
                weights = ease_weights(gram, l2)
            except ValueError:
                l2 *= 2
                continue
            if l2 != self.l2:
                log.warning(
                    "EASE: the training rows are not whole histories without repeated items; l2 is %g instead of %g, so that a solution exists",
                    l2,
                    self.l2,
                )
            return weights
