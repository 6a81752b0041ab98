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
from devices import add_device_arguments, describe, synchronize

from malleable import Catalog, EncoderSettings, SampledCE, SequenceBatch, SequentialRecommender, collate
from malleable.datamodules.negative_samplers import Popularity


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"items": 1_000_000, "negatives": 256, "steps": 10, "rows": 32, "length": 50, "dim": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    add_device_arguments(parser, dtype=False)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    items = np.minimum(random.pareto(1.0, (args.steps, args.rows, args.length)) * 100, args.items - 1).astype(np.int64)
    counts = np.bincount(items.flatten(), minlength=args.items) + 1
    catalog = Catalog(tuple(map(str, range(args.items))), popularity=tuple(counts.tolist()))
    sampler = Popularity(args.negatives, exponent=0.75)
    module = SequentialRecommender(EncoderSettings(dim=args.dim, max_length=args.length), catalog, loss=SampledCE(), negatives=sampler)
    module.configure_model()
    module.to(args.device)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    seconds, losses = [], []
    for number, step in enumerate(items):
        batch = collate([{"sample_id": number * args.rows + row, "items": own} for row, own in enumerate(step)], SequenceBatch).to(args.device)
        synchronize(args.device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = module.compute_loss(batch).loss
        loss.backward()
        optimizer.step()
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    targets = args.rows * (args.length - 1)
    sys.stdout.write(f"{args.items} items, {targets} targets and {args.negatives} negatives each in a step, {describe(args.device)}\n")
    sys.stdout.write(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {statistics.median(seconds):.2f} s a step\n")
    module.eval()
    queries = collate([{"sample_id": row, "items": own[:-1], "target": own[-1]} for row, own in enumerate(items[0])], SequenceBatch)
    queries = queries.to(args.device)
    start = time.perf_counter()
    module.recommend(queries, 10)
    synchronize(args.device)
    sys.stdout.write(f"{time.perf_counter() - start:.2f} s to rank all items for {args.rows} rows\n")
    on_cpu = torch.device(args.device).type == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    sys.stdout.write(f"peak memory: {peak / 2**30:.2f}\n")


if __name__ == "__main__":
    main()
