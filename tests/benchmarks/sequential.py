"""Measure a training epoch of our SASRec against RecBole's: equal width, layers, length and number of targets of a step, on MovieLens-100K.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/sequential.py [--length 20] [--dim 64] [--epochs 3] [--path FOLDER]

RecBole must be installed (the extra ``bench``; it needs pandas below 3). Both train for the same number of epochs on the same targets (ratings >= 4,
leave-last-out) with Adam; then both rank all unseen films for the test users. RecBole makes a row from each target and the items before it; our loss
has all targets of a part of a history in one row. The last line is RecBole's time of an epoch divided by ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from devices import add_device_arguments, describe, synchronize
from recbole_peer import RecBoleSASRec

from malleable import EncoderSettings, MovieLens, RecommendationDataModule, SequentialRecommender, Split
from malleable.lightning_modules.metrics.ranking import RankingMetrics

TARGETS = 256  # of a step


def make_data(path: str | None, length: int) -> RecommendationDataModule:
    """Return the films in packed rows, with about ``TARGETS`` targets in a step."""
    split = Split(min_rating=4, sequence_length=length)
    options = {"train_view": "packed_sequence", "pack_length": TARGETS, "eval_batch_size": 512}
    data = RecommendationDataModule(MovieLens(path=path), "none", split=split, **options)
    data.prepare_data()
    data.setup("fit")
    data.batch_size = max(1, round(TARGETS * len(data.train_dataset) / sum(data.row_tokens())))
    return data


def train_ours(data: RecommendationDataModule, args: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Train our model; return the seconds of each epoch and the metrics of the test."""
    torch.manual_seed(args.seed)
    sizes = {"dim": args.dim, "num_layers": args.layers, "num_heads": args.heads, "dropout": args.dropout, "max_length": args.length}
    module = SequentialRecommender(EncoderSettings("sasrec", **sizes), catalog=data.catalog)
    module.configure_model()
    module.to(args.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=args.lr)
    loader, seconds = data.train_dataloader(), []
    for epoch in range(args.epochs):
        module.train()
        loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        for batch in loader:
            optimizer.zero_grad()
            module.compute_loss(batch.to(args.device)).loss.backward()
            optimizer.step()
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
    metric = RankingMetrics((10,))
    module.eval()
    for batch in data.test_dataloader():
        metric.update(module.recommend(batch.to(args.device), 10).item_ids.cpu(), batch.target, batch.sample_id)
    return seconds, {name: float(value) for name, value in metric.compute().items()}


def train_theirs(data: RecommendationDataModule, args: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Train RecBole's model; return the seconds of each epoch and the metrics of the test."""
    sizes = {"length": args.length, "dim": args.dim, "layers": args.layers, "heads": args.heads, "dropout": args.dropout}
    peer = RecBoleSASRec(data, **sizes, batch_size=TARGETS, lr=args.lr, seed=args.seed, device=args.device)
    seconds = []
    for _ in range(args.epochs):
        start = time.perf_counter()
        for _ in peer.steps():
            pass
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
    return seconds, peer.evaluate(data.test_dataloader())


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of MovieLens-100K; default: download")
    for name, value in {"length": 20, "dim": 64, "layers": 2, "heads": 2, "epochs": 3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    add_device_arguments(parser, dtype=False)
    args = parser.parse_args()
    data = make_data(args.path, args.length)
    targets, steps = sum(data.row_tokens()), len(data.train_dataloader())
    sys.stdout.write(
        f"{targets} targets, {args.epochs} epochs of {steps} steps with {targets / steps:.0f} targets each, {describe(args.device)}" + "\n"
    )
    results = {}
    for name, train in (("ours", train_ours), ("RecBole", train_theirs)):
        seconds, figures = train(data, args)
        results[name] = statistics.median(seconds), figures
        sys.stdout.write(f"{name}: {results[name][0]:.2f} s an epoch, HR@10 {figures['hr_10']:.4f}, NDCG@10 {figures['ndcg_10']:.4f}" + "\n")
    if args.json:
        args.json.write_text(json.dumps(results))
    sys.stdout.write(f"ratio: {results['RecBole'][0] / results['ours'][0]:.2f}" + "\n")


if __name__ == "__main__":
    main()
