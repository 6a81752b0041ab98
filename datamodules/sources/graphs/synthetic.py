"""A small generated graph whose relations have patterns worth learning; made in memory, free of any terms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, number
from malleable.datamodules.sources.graphs.triples import hold_out


class SyntheticGraph(GraphSource):
    """Stations on a ring, in districts.

    ``next`` leads one station on and ``after next`` two (composed of ``next`` and ``next``), ``previous`` back from half of the stations (the
    inverse of ``next``), ``opposite`` across the ring (symmetric), and ``in`` to one of the districts (many to one).

    Args:
        num_stations: Stations, even.
        num_districts: Districts, at most as many.
        holdout: Shares of the triples to validate and to test with.
        seed: Seed of everything drawn.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, num_stations: int = 60, num_districts: int = 6, holdout: tuple[float, float] = (0.1, 0.1), seed: int = 0) -> None:
        if num_stations < 6 or num_stations % 2:
            raise ValueError(f"num_stations must be even and >= 6, got {num_stations}")
        if not 1 <= num_districts <= num_stations:
            raise ValueError(f"num_districts must be between 1 and num_stations ({num_stations}), got {num_districts}")
        if min(holdout) < 0 or sum(holdout) >= 1:
            raise ValueError(f"holdout must be two shares >= 0 that leave something to train with, got {tuple(holdout)}")
        self.num_stations = num_stations
        self.num_districts = num_districts
        self.holdout = (float(holdout[0]), float(holdout[1]))
        self.seed = seed

    def files(self) -> list[Path]:
        """Return none: everything is made from the settings."""
        return []

    def settings(self) -> dict[str, object]:
        """Return the arguments."""
        return dict(vars(self))

    def load(self) -> GraphTables:
        """Make the triples."""
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
