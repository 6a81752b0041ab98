"""Negative samplers of recommenders; those of knowledge graphs are in :mod:`malleable.lightning_modules.losses.embedding`.

Negative samplers select the rejected items of rows.

A selection depends on (seed, ``sample_id``, round) only, not on ranks, workers and batches. Samplers except :class:`SelfPlay` never select the true
item or an earlier item of the user. If a row has candidates, the negatives are selected from the candidates. Callbacks can use all samplers. Data
modules can use only samplers that need no model. :mod:`malleable.lightning_modules.recommendation.generated_negatives` generates the negatives of
samplers that need a model. Sequence models draw negatives for every position from the distribution of :meth:`NegativeSampler.item_weights`.

To add a sampler, subclass :class:`NegativeSampler` and list it in ``datamodules/__init__.pyi``. A sampler that needs a model also needs a branch in
``generate_negatives``.
"""

from __future__ import annotations

import random
from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, NamedTuple, Protocol


class ItemSampler:
    """Sampler of items without replacement, uniform or weighted.

    Args:
        items: Items to sample from.
        weights: Weight of each item, >= 0; uniform if ``None`` or all 0.
        seed: Seed; samples depend on it and on the row only.
    """

    def __init__(self, items: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        self.items = items
        self.weights = weights if weights is not None and any(weights) else None
        self.cumulative = None if self.weights is None else list(accumulate(self.weights))
        self.seed = seed

    def among(self, items: Sequence[int]) -> ItemSampler:
        """Return a sampler of the given items only. The items of this sampler must be ``0..N-1``, because their weights are read by item."""
        return ItemSampler(items, None if self.weights is None else [self.weights[item] for item in items], self.seed)

    def draw(self, sample_id: int, count: int, exclude: Collection[int]) -> list[int]:
        """Sample distinct items for a row.

        Args:
            sample_id: Id of the row.
            count: Number of items.
            exclude: Items that are not sampled.

        Raises:
            ValueError: If fewer than ``count`` items can be sampled.
        """
        rng = keyed_generator(self.seed, sample_id)
        taken = set(exclude)
        drawn: list[int] = []
        # Rejection sampling is fast if most items can be sampled; otherwise the list of the remaining items is created below.
        for _ in range(16 * count + 64):
            if len(drawn) == count:
                return drawn
            item = self._one(rng)
            if item not in taken:
                taken.add(item)
                drawn.append(item)
        weights = self.weights if self.weights is not None else [1.0] * len(self.items)
        rest = [item for item, weight in zip(self.items, weights, strict=True) if weight > 0 and item not in taken]
        if len(rest) < count - len(drawn):
            raise ValueError(
                f"row {sample_id} needs {count} sampled items, but only {len(drawn) + len(rest)} can be sampled: its own {len(set(exclude))} items "
                "are excluded; reduce num_negatives of the sampler, or candidates of the split"
            )
        return drawn + rng.sample(rest, count - len(drawn))

    def draw_position(self, sample_id: int, count: int) -> int:
        """Sample a position from ``0..count-1`` for a row."""
        return int(keyed_generator(self.seed, sample_id, stream=1).random() * count)

    def _one(self, rng: random.Random) -> int:
        if self.cumulative is None:
            return self.items[int(rng.random() * len(self.items))]
        return rng.choices(self.items, cum_weights=self.cumulative)[0]


def keyed_generator(seed: int, sample_id: int, stream: int = 0) -> random.Random:
    """Return a random generator that depends on the arguments only.

    Args:
        seed: Seed.
        sample_id: Id of the row.
        stream: 0 or 1, for two independent generators of a row.
    """
    return random.Random((((seed & 0xFFFFFFFF) << 64) + (sample_id & 0xFFFFFFFFFFFFFFFF)) * 2 + stream)


def round_seed(seed: int, round_number: int = 0) -> int:
    """Return the seed of a round of sampling, e.g. a round of self-play. Round 0 has the given seed."""
    return seed if round_number == 0 else (seed << 16) + round_number


class RowItems(NamedTuple):
    """Input of a negative sampler for one row.

    Attributes:
        sample_id: Id of the row.
        exclude: The true item and all earlier items of the user. Later items of the user can be sampled, because excluding them would leak validation
            and test items.
        candidates: Items to select from; empty for the whole catalogue.
    """

    sample_id: int
    exclude: Collection[int]
    candidates: Sequence[int] = ()


class BoundSampler(Protocol):
    """Negative sampler for one catalogue; :meth:`NegativeSampler.bind` returns it."""

    def __call__(self, row: RowItems) -> list[int]:
        """Return the negatives of a row."""


@dataclass
class NegativeSampler(ABC):  # noqa: B024  (jsonargparse takes no subclasses of a plain dataclass)
    """Base class of negative samplers.

    Attributes:
        num_negatives: Rejected items of each row; more than one needs a loss that supports several rejected answers.
    """

    needs_model: ClassVar[bool] = False
    num_negatives: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be >= 1, got {self.num_negatives}")

    def as_plain(self) -> dict[str, Any]:
        """Return the class path and the arguments, which checkpoints store."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": values}

    def item_weights(self, num_items: int, popularity: Sequence[int]) -> list[float] | None:
        """Return the weight of each item if negatives are drawn independently of the row; ``None``: all weights are equal.

        Args:
            num_items: Number of items of the catalogue.
            popularity: Number of training interactions of each item; may be empty if the sampler does not use them.

        Raises:
            ValueError: If the sampler needs a model.
        """
        raise ValueError(f"{type(self).__name__} does not draw items from a fixed distribution; use Uniform, Popularity or a Mixture of them")

    def bind(self, num_items: int, popularity: Sequence[int], seed: int) -> BoundSampler:
        """Return the sampler for the items of a catalogue.

        Args:
            num_items: Number of items of the catalogue.
            popularity: Number of training interactions of each item; may be empty if the sampler does not use them.
            seed: Seed of the samples, see :func:`round_seed`.

        Raises:
            ValueError: If the sampler needs a model.
        """
        raise ValueError(
            f"{type(self).__name__} needs a model, which a data module does not have: use it in SelfPlayLoop(negatives=...), or use Uniform or "
            "Popularity"
        )


@dataclass
class Uniform(NegativeSampler):
    """Uniformly sampled items.

    Attributes:
        num_negatives: Rejected items of each row.
    """

    num_negatives: int = 1

    def item_weights(self, num_items: int, popularity: Sequence[int]) -> None:
        """Return ``None``: all weights are equal."""

    def bind(self, num_items: int, popularity: Sequence[int], seed: int) -> BoundSampler:
        """Return the sampler for the items of a catalogue."""
        return _BoundItemSampler(ItemSampler(range(num_items), None, seed), self.num_negatives)


@dataclass
class Popularity(NegativeSampler):
    """Items sampled in proportion to a power of their popularity.

    Attributes:
        num_negatives: Rejected items of each row.
        exponent: Exponent of the popularity; 0 is uniform, 0.75 is common.
    """

    num_negatives: int = 1
    exponent: float = 1.0

    def bind(self, num_items: int, popularity: Sequence[int], seed: int) -> BoundSampler:
        """Return the sampler for the items of a catalogue."""
        return _BoundItemSampler(ItemSampler(range(num_items), self._powers(popularity), seed), self.num_negatives)

    def item_weights(self, num_items: int, popularity: Sequence[int]) -> list[float] | None:
        """Return the power of the popularity of each item; ``None`` if no item has interactions."""
        return [float(weight) for weight in self._powers(popularity)] if any(popularity) else None

    def _powers(self, popularity: Sequence[int]) -> Sequence[float]:
        return popularity if self.exponent == 1 else [count**self.exponent if count else 0.0 for count in popularity]


@dataclass
class Semantic(NegativeSampler):
    """Items sampled uniformly from those whose title embeddings are nearest to the embedding of the true title.

    Attributes:
        num_negatives: Rejected items of each row.
        pool: Number of nearest items to sample from.
    """

    needs_model: ClassVar[bool] = True
    num_negatives: int = 1
    pool: int = 50

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.pool < self.num_negatives:
            raise ValueError(f"pool {self.pool} must be at least num_negatives {self.num_negatives}")


@dataclass
class Hardest(NegativeSampler):
    """Items that the model ranks highest, without the true item.

    Attributes:
        num_negatives: Rejected items of each row.
        num_beams: Number of beams of the beam search.
    """

    needs_model: ClassVar[bool] = True
    num_negatives: int = 1
    num_beams: int = 20

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.num_beams < self.num_negatives:
            raise ValueError(f"num_beams {self.num_beams} must be at least num_negatives {self.num_negatives}")


@dataclass
class SelfPlay(NegativeSampler):
    """Recommendations of the model itself.

    Unlike with other samplers, an answer may be the true title, as in the published method. The option ``keep_identical`` of ``SelfPlayLoop``
    determines the treatment of rows whose rejected answer is the true title. "Released code" means the code of the paper's authors.

    Attributes:
        num_negatives: Rejected answers of each row; more than one needs a loss that supports several rejected answers.
        decode: ``greedy``: the most probable answer (released code). ``sample``: a sample from the model (theory of the paper). ``beam_k_random``: a
            random choice among the ``num_beams`` best answers. Measured on a model that DPO with random titles had biased towards few items: two
            rounds with sampled negatives removed most of the bias (the share of tail items in the recommendations was .001 before and .139 after).
            With greedy negatives, this share was .034. Only 4 to 7 % of the greedy negatives were distinct, and the mean popularity of the greedy
            negatives changed from 189 to 43 interactions.
        grounding: ``trie``: decode titles of the catalogue only. ``embedding``: generate free text and use the nearest title. ``none``: use the free
            text unchanged (released code).
        num_beams: Number of beams of ``beam_k_random``, and of ``greedy`` with several negatives.
        temperature: Temperature of ``sample``.
        top_p: Sample from the most probable tokens that together have this probability, for ``sample``.
        max_new_tokens: Maximum number of tokens of free text.
        exclude_seen: Exclude items that the user has interacted with: they are not wrong answers, and they are not recommended. The released code
            does not exclude them (false).

    Source:
        Gao et al. (2025), SPRec, arXiv:2412.09243, Section 4.
    """

    needs_model: ClassVar[bool] = True
    num_negatives: int = 1
    decode: Literal["greedy", "sample", "beam_k_random"] = "greedy"
    grounding: Literal["trie", "embedding", "none"] = "trie"
    num_beams: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 32
    exclude_seen: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; use decode='greedy' for the most probable answer")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.decode == "beam_k_random" and self.num_beams < self.num_negatives:
            raise ValueError(f"num_beams {self.num_beams} must be at least num_negatives {self.num_negatives}")
        if self.grounding != "trie" and (self.num_negatives > 1 or self.decode == "beam_k_random"):
            raise ValueError(f"grounding '{self.grounding}' generates one free answer for each row; several negatives or beams need grounding 'trie'")


@dataclass
class Mixture(NegativeSampler):
    """Mixture of samplers; the negatives of each row come from one randomly selected sampler.

    Attributes:
        num_negatives: Rejected items of each row.
        parts: The samplers; each must have the same ``num_negatives``.
        weights: Relative probability of each part; default: equal.
    """

    num_negatives: int = 1
    parts: Sequence[NegativeSampler] = ()
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the values, and build parts from plain data of a checkpoint."""
        super().__post_init__()
        self.parts = [_from_plain(part) if isinstance(part, Mapping) else part for part in self.parts]
        if len(self.parts) < 2:
            raise ValueError(f"a Mixture needs at least two parts, got {len(self.parts)}")
        if self.weights is not None and (len(self.weights) != len(self.parts) or min(self.weights) < 0 or not any(self.weights)):
            raise ValueError(f"weights must be {len(self.parts)} numbers >= 0, one for each part and not all 0, got {list(self.weights)}")
        if wrong := next((part for part in self.parts if part.num_negatives != self.num_negatives), None):
            raise ValueError(
                f"num_negatives is {self.num_negatives} in the Mixture, but {wrong.num_negatives} in its part {type(wrong).__name__}; "
                "set both to the same number"
            )

    def as_plain(self) -> dict[str, Any]:
        """Return the class path and the arguments, which checkpoints store."""
        plain = super().as_plain()
        plain["init_args"] |= {"parts": [part.as_plain() for part in self.parts], "weights": self.weights and list(self.weights)}
        return plain

    def item_weights(self, num_items: int, popularity: Sequence[int]) -> list[float]:
        """Return the probability of each item in the mixture of the distributions of the parts."""
        shares = self.weights or [1.0] * len(self.parts)
        mixed = [0.0] * num_items
        for part, share in zip(self.parts, shares, strict=True):
            own = part.item_weights(num_items, popularity) or [1.0] * num_items
            total = sum(own)
            mixed = [value + share * weight / total for value, weight in zip(mixed, own, strict=True)]
        return mixed

    def choose(self, sample_id: int, seed: int) -> int:
        """Return the index of the part that selects the negatives of a row."""
        return keyed_generator(seed, sample_id, stream=1).choices(range(len(self.parts)), self.weights)[0]

    def bind(self, num_items: int, popularity: Sequence[int], seed: int) -> BoundSampler:
        """Return the sampler for the items of a catalogue."""
        return _BoundMixture(self, [part.bind(num_items, popularity, seed) for part in self.parts], seed)


def _from_plain(value: Mapping[str, Any]) -> NegativeSampler:
    """Build a sampler from the output of :meth:`NegativeSampler.as_plain`.

    Raises:
        TypeError: If the class is no sampler.
    """
    kind = resolve_name(value["class_path"])
    if not (isinstance(kind, type) and issubclass(kind, NegativeSampler)):
        raise TypeError(f"the checkpoint names the class {value['class_path']}, which is not a NegativeSampler; use another checkpoint")
    return kind(**value.get("init_args", {}))


@dataclass(frozen=True)
class _BoundItemSampler:
    sampler: ItemSampler
    count: int

    def __call__(self, row: RowItems) -> list[int]:
        sampler = self.sampler.among(row.candidates) if len(row.candidates) else self.sampler
        return sampler.draw(row.sample_id, self.count, row.exclude)


@dataclass(frozen=True)
class _BoundMixture:
    mixture: Mixture
    parts: Sequence[BoundSampler]
    seed: int

    def __call__(self, row: RowItems) -> list[int]:
        return self.parts[self.mixture.choose(row.sample_id, self.seed)](row)
