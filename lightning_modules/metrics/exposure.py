"""Who gets recommended: diversity, concentration and fairness of exposure.

All figures are ratios of counts over the whole test set, so the states are integer histograms, summed over processes;
they are the same on any number of devices and in any order.

Shapes: B rows, K recommended items, L history items, N items of the catalogue, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.lightning_modules.metrics.ranking import check_ks, check_width

Tail = Literal["items", "interactions"]
OVER_RECOMMENDED = 3  # how many of the most recommended items ORRatio adds up


class ExposureMetrics(Metric):
    """Diversity, over-recommendation, fairness and popularity of recommended lists.

    With U rows, each with K slots; ``counts`` is how often each item fills a slot:

    - ``div_ratio_k``: distinct items / (K U); higher is more diverse.
    - ``or_ratio_k``: slots of the 3 most recommended items / (K U); lower is better.
    - ``coverage_k``: distinct items / N.
    - ``gini_k``: Gini coefficient of ``counts`` over all N items; 0 uniform, 1 - 1/N one item.
    - ``entropy_k``: entropy of ``counts`` in nats; log N uniform.
    - ``valid_ratio_k``: filled slots / (K U).
    - ``mgu_k``, ``dgu_k`` (with ``genres``): mean over groups of the absolute GP - GH, and max minus min of GP - GH, where GP is each
      group's share of the filled slots and GH its share of the history items; an item of m counted genres gives 1/m to each.
    - ``pop_mgu_k``, ``pop_dgu_k`` (with ``popularity``): the same over groups of equally many items, by popularity.
    - ``arp_k``, ``arp_ratio_k``: mean training interactions of the recommended items, and over that of the history items.
    - ``aplt_k``: share of filled slots that hold a tail item.

    Args:
        num_items: Size of the catalogue, N.
        ks: Cut-offs.
        genres: Genres of each item; ``None`` or nothing where unknown.
        counted_genres: Genres that count; default: all that occur.
        popularity: Training interactions of each item; ``None`` or nothing where unknown.
        tail: What is outside the head: ``items``, the most popular fifth of all items (rounded up); ``interactions``, the most
            popular items that together have 80 % of the interactions.
        num_groups: Popularity groups.

    Source:
        DivRatio, ORRatio: Gao et al. (2025), arXiv:2412.09243, and its authors' evaluation. MGU, DGU: Jiang et al. (2024),
        arXiv:2402.15215. Popularity groups: Gao et al. (2025), arXiv:2503.07377. ARP, APLT: Abdollahpouri et al. (2019),
        arXiv:1901.07555.
        Differs: U is all test rows; the authors leave out rows whose target is unknown in some figures and not in others.
    """

    full_state_update = False
    slot_counts: Tensor
    history_counts: Tensor
    rows: Tensor

    def __init__(
        self,
        num_items: int,
        ks: Sequence[int] = (1, 5, 10),
        genres: Sequence[Sequence[str]] | None = None,
        counted_genres: Sequence[str] | None = None,
        popularity: Sequence[int] | None = None,
        tail: Tail = "items",
        num_groups: int = 8,
    ) -> None:
        super().__init__()
        for name, value in (("genres", genres), ("popularity", popularity)):
            if value and len(value) != num_items:
                raise ValueError(f"{name} must have one entry for each of the {num_items} items, got {len(value)}")
        self.num_items = num_items
        self.ks = check_ks(ks)
        self.groups: dict[str, Tensor] = {}
        if genres and (counted_genres or any(genres)):
            self.groups[""] = genre_weights(genres, counted_genres)
        self.popularity = torch.tensor(popularity, dtype=torch.double) if popularity else None
        if self.popularity is not None:
            self.groups["pop_"] = popularity_groups(self.popularity, num_groups)
            self.tail_mask = tail_items(self.popularity, tail)
        self.add_state("slot_counts", torch.zeros(len(self.ks), num_items, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("history_counts", torch.zeros(num_items, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self._computed_counts: Tensor | None = None

    def update(self, recommended: Tensor, history: Tensor, sample_id: Tensor) -> None:
        """Add rows.

        Args:
            recommended: ``(B, K)`` item ids, best first, padded with -1, K at least the largest cut-off.
            history: ``(B, L)`` item ids that the prompts show, padded with -1.
            sample_id: ``(B,)``; negative rows are skipped.
        """
        check_width(recommended, self.ks[-1])
        real = sample_id >= 0
        # Not in place: states reset in inference mode could not be changed outside it.
        self.slot_counts = self.slot_counts + torch.stack([self._histogram(recommended[real, :k], "recommended") for k in self.ks])
        self.history_counts = self.history_counts + self._histogram(history[real], "history")
        self.rows = self.rows + real.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all rows of all processes; ``nan`` where nothing was counted."""
        counts, history = self.slot_counts.cpu(), self.history_counts.cpu().double()
        self._computed_counts = counts.clone()
        result: dict[str, Tensor] = {}
        for k, row in zip(self.ks, counts.double(), strict=True):
            values = self._concentration(row, self.rows.cpu().double() * k)
            for prefix, weights in self.groups.items():
                values[f"{prefix}mgu"], values[f"{prefix}dgu"] = group_unfairness(row @ weights, history @ weights)
            if self.popularity is not None:
                mean, wanted = (row @ self.popularity) / row.sum(), (history @ self.popularity) / history.sum()
                values |= {"arp": mean, "arp_ratio": mean / wanted, "aplt": row[self.tail_mask].sum() / row.sum()}
            result |= {f"{name}_{k}": value.float().to(self.device) for name, value in values.items()}
        return result

    def item_counts(self, k: int) -> Tensor:
        """How often each item was recommended among the first ``k``, ``(N,)``, over all processes, at the last :meth:`compute`."""
        if self._computed_counts is None:
            raise RuntimeError("item_counts are known after compute(); call it first, on all processes")
        if k not in self.ks:
            raise ValueError(f"k must be one of the cut-offs {self.ks}, got {k}")
        return self._computed_counts[self.ks.index(k)]

    def _histogram(self, items: Tensor, name: str) -> Tensor:
        counts = torch.bincount(items[items >= 0], minlength=self.num_items)
        if len(counts) > self.num_items:
            raise ValueError(f"{name} holds item {len(counts) - 1}, outside the catalogue of {self.num_items} items (ids from 0)")
        return counts

    def _concentration(self, counts: Tensor, slots: Tensor) -> dict[str, Tensor]:
        distinct = (counts > 0).double().sum()
        shares = counts / counts.sum()
        return {
            "div_ratio": distinct / slots,
            "or_ratio": counts.topk(min(OVER_RECOMMENDED, len(counts))).values.sum() / slots,
            "coverage": distinct / self.num_items,
            "gini": gini(counts),
            "entropy": -torch.xlogy(shares, shares).sum(),
            "valid_ratio": counts.sum() / slots,
        }


def gini(counts: Tensor) -> Tensor:
    """Gini coefficient of non-negative counts ``(N,)``: 0 where all are equal, 1 - 1/N where one has all."""
    ordered = counts.double().sort().values
    number = len(ordered)
    weights = 2 * torch.arange(1, number + 1, dtype=torch.double) - number - 1
    return (weights * ordered).sum() / (number * ordered.sum())


def group_unfairness(recommended: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Return MGU and DGU of two group masses ``(G,)``; each is normalised to shares first."""
    difference = recommended / recommended.sum() - history / history.sum()
    return difference.abs().mean(), difference.max() - difference.min()


def genre_weights(genres: Sequence[Sequence[str]], counted: Sequence[str] | None = None) -> Tensor:
    """Weight of each item in each counted genre, ``(N, G)`` float64; rows add up to 1, or 0 without a counted genre."""
    occurring = sorted({genre for item in genres for genre in item})
    names = occurring if counted is None else list(dict.fromkeys(counted))
    if not set(names) & set(occurring):
        raise ValueError(f"no item has a counted genre: counted {names}, the items' genres are {occurring}")
    column = {name: index for index, name in enumerate(names)}
    weights = torch.zeros(len(genres), len(names), dtype=torch.double)
    for row, item in enumerate(genres):
        own = [column[genre] for genre in set(item) if genre in column]
        if own:
            weights[row, own] = 1 / len(own)
    return weights


def popularity_groups(popularity: Tensor, num_groups: int = 8) -> Tensor:
    """Membership ``(N, G)`` in groups of equally many items, the most popular first; ties go by id."""
    order = popularity.argsort(descending=True, stable=True)
    number = len(popularity)
    groups = min(num_groups, number)
    membership = torch.zeros(number, groups, dtype=torch.double)
    membership[order, torch.arange(number) * groups // number] = 1
    return membership


def tail_items(popularity: Tensor, tail: Tail = "items") -> Tensor:
    """Mask ``(N,)`` of the items outside the head, as :class:`ExposureMetrics` defines it; ties go by id."""
    order = popularity.argsort(descending=True, stable=True)
    if tail == "items":
        head = -(-len(popularity) // 5)
    elif tail == "interactions":
        reached = popularity[order].double().cumsum(0)
        head = int((reached < 0.8 * reached[-1]).sum()) + 1
    else:
        raise ValueError(f"tail must be 'items' or 'interactions', got {tail!r}")
    mask = torch.ones(len(popularity), dtype=torch.bool)
    mask[order[:head]] = False
    return mask
