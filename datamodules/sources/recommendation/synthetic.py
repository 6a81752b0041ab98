"""Small synthetic catalogue whose users have preferences that a model can learn; generated in memory, without terms of use."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from malleable.datamodules.sources.recommendation.base import InteractionTables, Source, items_table

GENRES = ("Drama", "Comedy", "Mystery", "Western", "Fantasy", "Romance")
_FIRST = ("Silver", "Quiet", "Broken", "Golden", "Distant", "Hidden", "Crimson", "Frozen", "Gentle", "Hollow", "Iron", "Lonely", "Midnight", "Open")
_SECOND = ("River", "Garden", "Mirror", "Harbor", "Winter", "Letter", "Mountain", "Station", "Island", "Lantern", "Orchard", "Bridge", "Compass")


class Synthetic(Source):
    """Synthetic interactions of users who have a favourite genre and usually continue the series of the last item.

    Items that do not continue a series are sampled by popularity, mostly from the favourite genre.

    Args:
        num_users: Number of users.
        num_items: Number of items, at most 182.
        num_events: Number of interactions of each user, at most the number of items of a genre.
        num_genres: Number of genres, at most 6; each item has one genre, and the items of a genre are the parts of one series.
        persistence: Probability that a user continues the series of the last item.
        seed: Seed of all random choices.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        num_users: int = 200,
        num_items: int = 60,
        num_events: int = 12,
        num_genres: int = 4,
        persistence: float = 0.7,
        seed: int = 0,
    ) -> None:
        if not 1 <= num_genres <= len(GENRES):
            raise ValueError(f"num_genres must be between 1 and {len(GENRES)}, got {num_genres}")
        if not num_genres <= num_items <= len(_FIRST) * len(_SECOND):
            raise ValueError(f"num_items must be between num_genres ({num_genres}) and {len(_FIRST) * len(_SECOND)}, got {num_items}")
        if not 2 <= num_events <= num_items // num_genres:
            raise ValueError(f"num_events must be between 2 and the items of a genre ({num_items // num_genres}), got {num_events}")
        if not 0 <= persistence <= 1:
            raise ValueError(f"persistence must be in [0, 1], got {persistence}")
        self.num_users, self.num_items, self.num_events, self.num_genres = num_users, num_items, num_events, num_genres
        self.persistence = persistence
        self.seed = seed

    def files(self) -> list[Path]:
        """Return ``[]``: the data are generated from the settings."""
        return []

    def settings(self) -> dict[str, object]:
        """Return the arguments."""
        return dict(vars(self))

    def load(self) -> InteractionTables:
        """Generate users and items."""
        rng = np.random.default_rng(self.seed)
        genre = np.arange(self.num_items) % self.num_genres
        weights = 1.0 / (1.0 + rng.permutation(self.num_items))
        histories = [self._history(rng, genre, weights) for _ in range(self.num_users)]
        events = [(str(user), str(item), float(step)) for user, items in enumerate(histories) for step, item in enumerate(items)]
        words = list(product(_FIRST, _SECOND))
        order = rng.permutation(len(words))
        titles = [f"The {' '.join(words[order[item]])} ({1950 + int(rng.integers(70))})" for item in range(self.num_items)]
        interactions = pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"])
        return InteractionTables(interactions, items_table([str(item) for item in range(self.num_items)], titles, [(GENRES[g],) for g in genre]))

    def _history(self, rng: np.random.Generator, genre: np.ndarray, weights: np.ndarray) -> list[int]:
        liked = genre == rng.integers(self.num_genres)
        fresh = np.ones(self.num_items, dtype=bool)
        items: list[int] = []
        for _ in range(self.num_events):
            # The numbers of consecutive items of a genre differ by num_genres. After the last part of a series, the next item is sampled.
            successor = (items[-1] + self.num_genres) if items else self.num_items
            if successor >= self.num_items or not fresh[successor] or rng.random() >= self.persistence:
                chances = weights * fresh * np.where(liked, 1.0, 0.05)
                successor = int(rng.choice(self.num_items, p=chances / chances.sum()))
            items.append(successor)
            fresh[successor] = False
        return items
