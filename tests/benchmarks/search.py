"""Measure exact search against FAISS: the 10 nearest of 1,000,000 vectors of width 384 by inner product, for 1,000 queries.

    OMP_NUM_THREADS=1 python tests/benchmarks/search.py [--json RESULT.json]

Both sides use as many threads as torch. FAISS (IndexFlatIP) computes matrix products with its own OpenBLAS. The sides alternate, and the medians of
their times are compared. The last line is our time divided by that of FAISS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
from devices import add_device_arguments, describe

from malleable.lightning_modules.functional.search.nearest import nearest
from malleable.lightning_modules.functional.search.vector_space import unit_rows

WIDTH, K = 384, 10
TOLERANCE = 1e-5  # of float32 scores of vectors of length 1


def timed(function: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    """Return seconds and result of a call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def check(own: tuple[torch.Tensor, torch.Tensor], peer: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Stop if items or scores ``(Q, K)`` of both sides differ by more than rounding."""
    distance = (own[1] - peer[1]).abs()
    if distance.max() > TOLERANCE:
        raise SystemExit(f"the scores of both sides differ by {distance.max():.1e}")
    # Items in another order have equal scores up to rounding; the last one may be left out by one side.
    gaps = torch.nn.functional.pad(own[1].diff(dim=1).abs(), (1, 0), value=torch.inf)
    clear = (gaps > TOLERANCE) & (torch.nn.functional.pad(gaps[:, 1:], (0, 1), value=0) > TOLERANCE)
    if (differing := (own[0] != peer[0])[clear].sum()) > 0:
        raise SystemExit(f"{differing} of {own[0].numel()} items of both sides differ")


def main() -> None:
    """Measure both sides, and print their times and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="number of vectors (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1_000, help="number of queries (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="number of measurements of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_device_arguments(parser, dtype=False)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    vectors = torch.cat([unit_rows(torch.randn(len(rows), WIDTH, generator=generator)) for rows in torch.arange(arguments.vectors).split(50_000)])
    queries = unit_rows(torch.randn(arguments.queries, WIDTH, generator=generator))
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors.numpy())
    own_queries, own_vectors = queries.to(arguments.device), vectors.to(arguments.device)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        found = nearest(own_queries, own_vectors, K)
        return found.items.cpu(), found.scores.cpu()

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        scores, items = index.search(queries.numpy(), K)
        return torch.from_numpy(items), torch.from_numpy(scores)

    nearest(own_queries, own_vectors[:20_000], K)  # the first products of a process are slower
    times: dict[str, list[float]] = {"ours": [], "faiss": []}
    for _ in range(arguments.repeats):
        peer_time, peer = timed(theirs)
        own_time, own = timed(ours)
        times["ours"].append(own_time)
        times["faiss"].append(peer_time)
        check(own, peer)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["ours"] / medians["faiss"]
    result = {
        **{f"{name}_s": values for name, values in times.items()},
        "ratio": ratio,
        "device": describe(arguments.device),
        "faiss": faiss.__version__,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{arguments.queries} queries, {arguments.vectors} vectors; {describe(arguments.device)}, faiss {faiss.__version__}\n")
    for name, values in times.items():
        sys.stdout.write(f"{name}: {medians[name]:.2f} s (of {', '.join(f'{value:.2f}' for value in values)})\n")
    sys.stdout.write(f"ratio: {ratio:.2f}\n")


if __name__ == "__main__":
    main()
