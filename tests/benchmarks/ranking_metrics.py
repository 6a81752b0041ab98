"""Measure our ranking metrics against the retrieval metrics of torchmetrics: 4,000 queries of 100 scored candidates.

    python tests/benchmarks/ranking_metrics.py [--device cuda] [--json RESULT.json]

The last line is the time of torchmetrics divided by ours, for six metrics each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from devices import add_device_arguments, synchronize
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR, RetrievalNormalizedDCG, RetrievalPrecision, RetrievalRecall

from malleable.lightning_modules.metrics.ranking import ScoredRankingMetrics

QUERIES, CANDIDATES, K, REPEATS, BATCH = 4_000, 100, 10, 3, 500
PEERS = {
    "hr": RetrievalHitRate,
    "recall": RetrievalRecall,
    "precision": RetrievalPrecision,
    "mrr": RetrievalMRR,
    "ndcg": RetrievalNormalizedDCG,
    "map": RetrievalMAP,
}


def ours(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compute all metrics of :data:`PEERS` with our class, by name, from scores and labels ``(Q, C)``."""
    metric = ScoredRankingMetrics(ks=(K,)).to(scores.device)
    ids = torch.arange(QUERIES, device=scores.device)
    for rows in ids.split(BATCH):
        metric.update(scores[rows], labels[rows], torch.ones_like(labels[rows], dtype=torch.bool), rows)
    result = metric.compute()
    return {name: result[f"{name}_{K}"].item() for name in PEERS}


def theirs(names: list[str], scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compute the given metrics with torchmetrics, by name, from scores and labels ``(Q, C)``."""
    result = {}
    ids = torch.arange(QUERIES, device=scores.device)
    for name in names:
        metric = PEERS[name](top_k=K).to(scores.device)
        for rows in ids.split(BATCH):
            metric.update(scores[rows].flatten(), labels[rows].flatten(), indexes=rows.repeat_interleave(CANDIDATES))
        result[name] = metric.compute().item()
    return result


def best_time(function: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    """Return the shortest time of several runs in seconds, and the result of the last run."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        values = function()
        times.append(time.perf_counter() - start)
    return min(times), values


def main() -> None:
    """Measure both sides, and print their times and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_device_arguments(parser, dtype=False)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(QUERIES, CANDIDATES, generator=generator)
    labels = (torch.rand(QUERIES, CANDIDATES, generator=generator) < 0.05).long()
    labels[:, 0] = 1  # a relevant candidate in every query, so that both average the same rows
    scores, labels = scores.to(arguments.device), labels.to(arguments.device)
    synchronize(arguments.device)
    own_time, own = best_time(lambda: ours(scores, labels))
    ndcg_time, _ = best_time(lambda: theirs(["ndcg"], scores, labels))
    peer_time, peer = best_time(lambda: theirs(list(PEERS), scores, labels))
    for name in PEERS:
        # MAP is not compared: torchmetrics divides by the number of relevant candidates among the first k, we divide by min(k, relevant).
        if name != "map" and abs(own[name] - peer[name]) > 1e-6:
            raise SystemExit(f"the values of {name} differ: ours is {own[name]}, that of torchmetrics is {peer[name]}")
    result = {"ours_s": own_time, "torchmetrics_s": peer_time, "torchmetrics_ndcg_only_s": ndcg_time, "ratio": peer_time / own_time}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(
        f"ours, six metrics: {own_time:.3f} s\ntorchmetrics, six metrics: {peer_time:.3f} s\ntorchmetrics, nDCG alone: {ndcg_time:.3f} s\n"
    )
    sys.stdout.write(f"ratio: {result['ratio']:.1f}\n")


if __name__ == "__main__":
    main()
