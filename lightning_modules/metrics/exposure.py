"""Exposure metrics: diversity, concentration and fairness of recommended items.

The metrics are computed from counts over the whole test set. The states are integer histograms, summed over processes, so they do not depend on
the order of rows or on the number of devices.

Shapes: B rows, K recommended items, L history items, N items of the catalogue, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from malleable.lightning_modules.metrics.ranking import check_ks, check_width

Tail = Literal["items", "interactions"]
OVER_RECOMMENDED = 3  # number of most recommended items in ORRatio


class ExposureMetrics(Metric):
    """Diversity, over-recommendation, fairness and popularity of recommended lists.

    There are U rows with k slots each. ``counts`` are the numbers of slots of each item:

    - ``div_ratio_k``: distinct items / (k U); higher is more diverse.
    - ``or_ratio_k``: slots of the 3 most recommended items / (k U); lower is better.
    - ``coverage_k``: distinct items / N.
    - ``gini_k``: Gini coefficient of ``counts`` over all N items; 0 if all counts are equal, 1 - 1/N if only one item is recommended.
    - ``entropy_k``: entropy of ``counts`` in nats; log N if all counts are equal.
    - ``valid_ratio_k``: filled slots / (k U).
    - ``mgu_k``, ``dgu_k`` (with ``genres``): mean over groups of the absolute value of GP - GH, and maximum minus minimum of GP - GH. GP is the share
      of a group in the filled slots, and GH is its share in the history items. An item with m counted genres adds 1/m to each of them.
    - ``pop_mgu_k``, ``pop_dgu_k`` (with ``popularity``): MGU and DGU for groups of items by popularity, with equally many items in each group.
    - ``arp_k``, ``arp_ratio_k`` (with ``popularity``): mean number of training interactions of the recommended items, and its ratio to that of the
      history items.
    - ``aplt_k`` (with ``popularity``): share of filled slots with a tail item.

    Args:
        num_items: Size of the catalogue, N.
        ks: Cut-offs.
        genres: Genres of each item of the catalogue; ``None`` or empty if unknown.
        counted_genres: Genres that form groups; default: all genres of the items.
        popularity: Number of training interactions of each item; ``None`` or empty if unknown.
        tail: Definition of the head; all other items are tail items. ``items``: the head is the most popular fifth of all items, rounded up.
            ``interactions``: the head is the smallest set of most popular items with at least 80 % of the interactions.
        num_groups: Number of popularity groups.

    Raises:
        ValueError: If an argument is out of range or has a wrong length.

    Source:
        DivRatio, ORRatio: Gao et al. (2025), arXiv:2412.09243, and its authors' evaluation. MGU, DGU: Jiang et al. (2024),
        arXiv:2402.15215. Popularity groups: Gao et al. (2025), arXiv:2503.07377. ARP, APLT: Abdollahpouri et al. (2019),
        arXiv:1901.07555.
        Differs: U is the number of all test rows. The authors omit rows with an unknown target in some of the metrics.
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
        self._computed_histories: Tensor | None = None

    def update(self, recommended: Tensor, history: Tensor, sample_id: Tensor) -> None:
        """Add rows.

        Args:
            recommended: ``(B, K)`` item ids, best first, padded with -1, K at least the largest cut-off.
            history: ``(B, L)`` item ids of the histories, padded with -1.
            sample_id: ``(B,)`` ids; rows with a negative id are skipped.
        """
        check_width(recommended, self.ks[-1])
        real = sample_id >= 0
        # Not in place: a state that was reset in inference mode cannot be modified outside it.
        self.slot_counts = self.slot_counts + torch.stack([self._histogram(recommended[real, :k], "recommended") for k in self.ks])
        self.history_counts = self.history_counts + self._histogram(history[real], "history")
        self.rows = self.rows + real.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all rows of all processes; ``nan`` where all counts are 0."""
        counts, history = self.slot_counts.cpu(), self.history_counts.cpu().double()
        self._computed_counts, self._computed_histories = counts.clone(), history
        result: dict[str, Tensor] = {}
        for k, row in zip(self.ks, counts.double(), strict=True):
            values = self._concentration(row, self.rows.cpu().double() * k)
            for prefix, weights in self.groups.items():
                values[f"{prefix}mgu"], values[f"{prefix}dgu"] = group_unfairness(row @ weights, history @ weights)
            if self.popularity is not None:
                mean, history_mean = (row @ self.popularity) / row.sum(), (history @ self.popularity) / history.sum()
                values |= {"arp": mean, "arp_ratio": mean / history_mean, "aplt": row[self.tail_mask].sum() / row.sum()}
            result |= {f"{name}_{k}": value.float().to(self.device) for name, value in values.items()}
        return result

    def item_counts(self, k: int) -> Tensor:
        """Return how often each item was among the first ``k``, ``(N,)``, over all processes, at the last call of :meth:`compute`.

        Raises:
            RuntimeError: If :meth:`compute` has not been called.
            ValueError: If ``k`` is not a cut-off.
        """
        if self._computed_counts is None:
            raise RuntimeError("item_counts is available after compute(); call compute() first, on all processes")
        if k not in self.ks:
            raise ValueError(f"k must be one of the cut-offs {self.ks}, got {k}")
        return self._computed_counts[self.ks.index(k)]

    def inputs(self) -> dict[str, dict[str, str]]:
        """Return what metrics are computed with besides the recommended items. Values with different inputs must not be compared.

        Returns:
            By name of a metric without cut-off: kind of each input, such as ``genres``, and its size and digest. ``histories`` are included after
            :meth:`compute`. Metrics that depend on the recommended items only are omitted.
        """
        found: dict[str, dict[str, str]] = {}
        for prefix, weights in self.groups.items():
            text = f"{weights.shape[1]} ({_digest(weights)})"
            found |= {f"{prefix}{name}": {"popularity groups" if prefix else "genres": text} for name in ("mgu", "dgu")}
        if self.popularity is not None:
            text = f"of {int(self.popularity.sum())} training interactions ({_digest(self.popularity)})"
            found |= {name: {"popularity": text} for name in ("arp", "arp_ratio")}
            found["aplt"] = {"tail items": f"{int(self.tail_mask.sum())} ({_digest(self.tail_mask)})"}
        if self._computed_histories is not None:
            text = f"with {int(self._computed_histories.sum())} items ({_digest(self._computed_histories)})"
            for name in found.keys() - {"arp", "aplt"}:
                found[name]["histories"] = text
        return found

    def _histogram(self, items: Tensor, name: str) -> Tensor:
        counts = torch.bincount(items[items >= 0], minlength=self.num_items)
        if len(counts) > self.num_items:
            raise ValueError(
                f"{name} contains item {len(counts) - 1}, but the catalogue has items 0 to {self.num_items - 1}; use the catalogue of these rows"
            )
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


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:8]


def gini(counts: Tensor) -> Tensor:
    """Compute the Gini coefficient of non-negative counts ``(N,)``: 0 if all are equal, 1 - 1/N if only one is not 0."""
    ordered = counts.double().sort().values
    number = len(ordered)
    weights = 2 * torch.arange(1, number + 1, dtype=torch.double) - number - 1
    return (weights * ordered).sum() / (number * ordered.sum())


def group_unfairness(recommended: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Compute MGU and DGU of the totals ``(G,)`` of groups, which are normalised to shares first."""
    difference = recommended / recommended.sum() - history / history.sum()
    return difference.abs().mean(), difference.max() - difference.min()


def genre_weights(genres: Sequence[Sequence[str]], counted: Sequence[str] | None = None) -> Tensor:
    """Compute the weight of each item in each counted genre, ``(N, G)`` float64; rows sum to 1, or to 0 without a counted genre."""
    occurring = sorted({genre for item in genres for genre in item})
    names = occurring if counted is None else list(dict.fromkeys(counted))
    if not set(names) & set(occurring):
        raise ValueError(f"no item has a genre of counted_genres {names}; choose from the genres of the items: {occurring}")
    column = {name: index for index, name in enumerate(names)}
    weights = torch.zeros(len(genres), len(names), dtype=torch.double)
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, item in enumerate(genres):
        own = [column[genre] for genre in set(item) if genre in column]
        rows += [row] * len(own)
        columns += own
        values += [1 / len(own)] * len(own) if own else []
    # One assignment for all values, because a million single assignments take ten seconds.
    weights[rows, columns] = torch.tensor(values, dtype=torch.double)
    return weights


def popularity_groups(popularity: Tensor, num_groups: int = 8) -> Tensor:
    """Return the membership ``(N, G)`` of items in groups of equal size, the most popular group first; ties are ordered by id."""
    order = popularity.argsort(descending=True, stable=True)
    number = len(popularity)
    groups = min(num_groups, number)
    membership = torch.zeros(number, groups, dtype=torch.double)
    membership[order, torch.arange(number) * groups // number] = 1
    return membership


def tail_items(popularity: Tensor, tail: Tail = "items") -> Tensor:
    """Return the mask ``(N,)`` of tail items, as defined in :class:`ExposureMetrics`; ties are ordered by id."""
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
