"""EASE: a linear autoencoder in closed form."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from malleable.datamodules.batch import Catalog
from malleable.lightning_modules.functional.recommendation.ease import ease_weights
from malleable.lightning_modules.recommendation.baselines import ItemKNN

ALL = 1 << 30  # number of last items, more than any history has


class EASE(ItemKNN):
    """Recommend items by a linear model of the items of the history, which is computed in closed form.

    score(j) = sum over the items i of the history of ``B[i, j]``, with the weights ``B`` that reconstruct each user's items best, without weights of an
    item for itself and with a penalty ``l2 |B|^2``.

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
        """Compute the weights ``B``, ``(N, N)``."""
        gram = self.pairs.float()
        gram += self.pairs.T
        gram.diagonal().copy_(self.counts)
        return ease_weights(gram, self.l2)
