"""Train SASRec on a catalogue of a million items with sampled negatives, and print the time of a step and the peak memory.

    OMP_NUM_THREADS=2 python tests/benchmarks/many_items.py [--items 1000000] [--negatives 256] [--steps 10]

Histories are drawn from a distribution in which few items are frequent. The last line is the peak memory in GiB.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time

import numpy as np
import torch

from malleable import Catalog, EncoderSettings, SampledCE, SequenceBatch, SequentialRecommender, collate
from malleable.datamodules.negative_samplers import Popularity


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"items": 1_000_000, "negatives": 256, "steps": 10, "rows": 32, "length": 50, "dim": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    items = np.minimum(random.pareto(1.0, (args.steps, args.rows, args.length)) * 100, args.items - 1).astype(np.int64)
    counts = np.bincount(items.flatten(), minlength=args.items) + 1
    catalog = Catalog(tuple(map(str, range(args.items))), popularity=tuple(counts.tolist()))
    sampler = Popularity(args.negatives, exponent=0.75)
    module = SequentialRecommender(EncoderSettings(dim=args.dim, max_length=args.length), catalog, loss=SampledCE(), negatives=sampler)
    module.configure_model()
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    seconds, losses = [], []
    for number, step in enumerate(items):
        batch = collate([{"sample_id": number * args.rows + row, "items": own} for row, own in enumerate(step)], SequenceBatch)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = module.compute_loss(batch).loss
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    targets = args.rows * (args.length - 1)
    sys.stdout.write(f"{args.items} items, {targets} targets and {args.negatives} negatives each in a step, {torch.get_num_threads()} threads\n")
    sys.stdout.write(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {statistics.median(seconds):.2f} s a step\n")
    module.eval()
    queries = collate([{"sample_id": row, "items": own[:-1], "target": own[-1]} for row, own in enumerate(items[0])], SequenceBatch)
    start = time.perf_counter()
    module.recommend(queries, 10)
    sys.stdout.write(f"{time.perf_counter() - start:.2f} s to rank all items for {args.rows} rows\n")
    sys.stdout.write(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}\n")


if __name__ == "__main__":
    main()
