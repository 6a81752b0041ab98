"""Small synthetic graph whose relations have patterns; generated in memory, without terms of use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, number
from malleable.datamodules.sources.graphs.triples import hold_out


class SyntheticGraph(GraphSource):
    """Synthetic graph of stations on a ring, in districts.

    Relations: ``next`` (to the next station), ``after next`` (the composition of ``next`` and ``next``), ``previous`` (the inverse of ``next``, for
    half of the stations), ``opposite`` (symmetric) and ``in`` (to one of the districts, many-to-one).

    Args:
        num_stations: Number of stations, even.
        num_districts: Number of districts, at most ``num_stations``.
        holdout: Shares of the triples for validation and test.
        seed: Seed of the stations with ``previous`` and of the split.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, num_stations: int = 60, num_districts: int = 6, holdout: tuple[float, float] = (0.1, 0.1), seed: int = 0) -> None:
        if num_stations < 6 or num_stations % 2:
            raise ValueError(f"num_stations must be even and >= 6, got {num_stations}")
        if not 1 <= num_districts <= num_stations:
            raise ValueError(f"num_districts must be between 1 and num_stations ({num_stations}), got {num_districts}")
        if min(holdout) < 0 or sum(holdout) >= 1:
            raise ValueError(f"holdout must be two shares >= 0 with a sum < 1, got {tuple(holdout)}")
        self.num_stations = num_stations
        self.num_districts = num_districts
        self.holdout = (float(holdout[0]), float(holdout[1]))
        self.seed = seed

    def files(self) -> list[Path]:
        """Return ``[]``: the graph is generated from the settings."""
        return []

    def settings(self) -> dict[str, object]:
        """Return the arguments."""
        return dict(vars(self))

    def load(self) -> GraphTables:
        """Generate the triples."""
        count = self.num_stations
        stations = [f"station {place:0{len(str(count - 1))}}" for place in range(count)]
        districts = [f"district {place}" for place in range(self.num_districts)]
        returning = np.random.default_rng(self.seed).permutation(count)[: count // 2]
        triples = [
            *(
                (stations[place], relation, stations[(place + step) % count])
                for relation, step in (("next", 1), ("after next", 2))
                for place in range(count)
            ),
            *((stations[place], "previous", stations[place - 1]) for place in sorted(returning.tolist())),
            *((stations[place], "opposite", stations[(place + count // 2) % count]) for place in range(count)),
            *((stations[place], "in", districts[place * self.num_districts // count]) for place in range(count)),
        ]
        return hold_out(number({"train": triples}), self.holdout, self.seed)
