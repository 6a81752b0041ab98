"""Compare our SASRec and HSTU with SASRec of RecBole: the same rows, sizes, optimizer and selection of the epoch, several seeds.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/sequential_study.py --data ml100k --folder runs/study [--shared FOLDER]

Data: ``ml100k`` (ratings >= 4, leave-last-out), ``cds`` (Amazon CDs, split by time) and ``lastfm`` (rows of LLaRA and S-DPO). They are in the folder
``rec`` of ``--shared``. The latter two are rows of at most 10 items before a target, without times. All unseen items are ranked. After each epoch,
the validation rows are ranked; the epoch with the best NDCG@10 is tested. RecBole has no schedules: it trains with a constant learning rate until
``--patience`` epochs bring no better one. Ours trains for ``--epochs`` epochs with the schedule of its recipe, a linear decay (``--decay constant``:
as RecBole). By default, ours trains at all positions of packed parts of histories; with ``--view answer``, each target has a row of its own with the
items before it, as in RecBole. A run that is already in the folder is not repeated. The last lines are a table: mean and standard deviation over the
seeds.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from devices import add_device_arguments
from recbole_peer import RecBoleSASRec

from malleable import EncoderSettings, MovieLens, RecommendationDataModule, SequentialRecommender, Source, Split
from malleable.datamodules.sources.recommendation.base import ReadyRow, ReadyRows, items_table
from malleable.datamodules.sources.recommendation.candidates import CandidateRows
from malleable.lightning_modules.functional.schedule import warmup_decay
from malleable.lightning_modules.metrics.ranking import RankingMetrics

TARGETS = 256  # of a step
MODELS = ("RecBole SASRec", "SASRec", "HSTU")
Evaluate = Callable[[str], dict[str, float]]


class AmazonCDs(Source):
    """Rows of ``{history: [ids], next: id}`` for training, tables of rows for validation and test, and ``items.tsv`` with title and id."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def files(self) -> list[Path]:
        return [self.path / name for name in ("train_seq.jsonl", "valid.csv", "test.csv", "items.tsv")]

    def load(self) -> ReadyRows:
        train, valid, test, items = self.files()
        pairs = [line.rpartition("\t")[::2] for line in items.read_text(encoding="utf-8").splitlines()]
        position = {int(key): number for number, (_, key) in enumerate(pairs)}
        found = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
        rows = {"train": [ReadyRow([position.get(item, -1) for item in row["history"]], position.get(row["next"], -1)) for row in found]}
        for name, path in (("val", valid), ("test", test)):
            with path.open(encoding="utf-8", newline="") as file:
                rows[name] = [
                    ReadyRow([position.get(item, -1) for item in ast.literal_eval(row["history_item_id"])], position.get(int(row["item_id"]), -1))
                    for row in csv.DictReader(file)
                ]
        return ReadyRows(items_table([key for _, key in pairs], [title for title, _ in pairs], [()] * len(pairs)), rows)


def make_data(name: str, shared: Path, length: int, view: str) -> RecommendationDataModule:
    """Return the rows of a data set, with about ``TARGETS`` targets in a step."""
    folder = shared / "rec"
    sources: dict[str, Callable[[], Source]] = {
        "ml100k": lambda: MovieLens(path=str(folder / "ml100k")),
        "cds": lambda: AmazonCDs(str(folder / "amazon_cds")),
        "lastfm": lambda: CandidateRows(str(folder / "lastfm_cans20")),
    }
    split = Split(min_rating=4 if name == "ml100k" else None, sequence_length=length, history_length=length)
    options: dict[str, Any] = {"train_view": view, "pack_length": TARGETS, "batch_size": TARGETS, "eval_batch_size": 512}
    data = RecommendationDataModule(sources[name](), "none", split=split, **options)
    data.prepare_data()
    data.setup("fit")
    if view != "answer":
        data.batch_size = max(1, round(TARGETS * len(data.train_dataset) / sum(data.row_tokens())))
    return data


def ours(kind: str, data: RecommendationDataModule, args: argparse.Namespace, seed: int) -> tuple[Callable[[int], None], Evaluate]:
    """Return functions that train our model for an epoch, and that evaluate it on a split."""
    torch.manual_seed(seed)
    sizes = {"dim": args.dim, "num_layers": args.layers, "num_heads": args.heads, "dropout": args.dropout, "max_length": args.length}
    buckets = 64 if data.train_view != "answer" and data.sequence_dataset.columns.times is not None else 0
    module = SequentialRecommender(EncoderSettings(kind, time_buckets=buckets, **sizes), catalog=data.catalog)
    module.configure_model()
    module.to(args.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=args.lr)
    data.seed = seed
    loader = data.train_dataloader()
    schedule = partial(warmup_decay, total=args.epochs * len(loader), warmup=20 if args.decay == "linear" else 0, decay=args.decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def train(epoch: int) -> None:
        module.train()
        loader.sampler.set_epoch(seed * 1000 + epoch)
        for batch in loader:
            optimizer.zero_grad()
            module.compute_loss(batch.to(args.device)).loss.backward()
            optimizer.step()
            scheduler.step()

    def evaluate(split: str) -> dict[str, float]:
        metric = RankingMetrics((10,))
        module.eval()
        for batch in loader_of(data, split):
            metric.update(module.recommend(batch.replace(candidates=None).to(args.device), 10).item_ids.cpu(), batch.target, batch.sample_id)
        return {name: float(value) for name, value in metric.compute().items()}

    return train, evaluate


def theirs(data: RecommendationDataModule, args: argparse.Namespace, seed: int) -> tuple[Callable[[int], None], Evaluate]:
    """Return functions that train RecBole's model for an epoch, and that evaluate it on a split."""
    sizes = {"length": args.length, "dim": args.dim, "layers": args.layers, "heads": args.heads, "dropout": args.dropout}
    peer = RecBoleSASRec(data, **sizes, batch_size=TARGETS, lr=args.lr, seed=seed, device=args.device)

    def train(epoch: int) -> None:
        for _ in peer.steps():
            pass

    return train, lambda split: peer.evaluate(loader_of(data, split))


def loader_of(data: RecommendationDataModule, split: str) -> Any:
    """Return the loader of a split."""
    return data.val_dataloader() if split == "val" else data.test_dataloader()


def run(model: str, data: RecommendationDataModule, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train a model, and return the metrics of the test at its best epoch, with the number of the epoch and the seconds of training."""
    train, evaluate = theirs(data, args, seed) if model == MODELS[0] else ours(model.lower(), data, args, seed)
    best: dict[str, float] = {"val_ndcg_10": -1.0}
    seconds = 0.0
    scheduled = model != MODELS[0] and args.decay == "linear"
    for epoch in range(args.epochs if scheduled else args.max_epochs):
        start = time.perf_counter()
        train(epoch)
        seconds += time.perf_counter() - start
        value = evaluate("val")["ndcg_10"]
        sys.stderr.write(f"{args.data}, {model}, seed {seed}, epoch {epoch}: validation NDCG@10 {value:.4f}, {seconds:.0f} s\n")
        if value > best["val_ndcg_10"]:
            best = evaluate("test") | {"val_ndcg_10": value, "epoch": epoch + 1, "seconds": seconds}
        elif epoch + 1 - best["epoch"] >= args.patience and not scheduled:
            break
    return best


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("ml100k", "cds", "lastfm"), default="ml100k")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder with the data sets")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the results")
    for name, value in {"seeds": 3, "length": 20, "dim": 64, "layers": 2, "heads": 2, "epochs": 10, "max_epochs": 30, "patience": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--view", choices=("packed_sequence", "answer"), default="packed_sequence", help="training rows of our models")
    parser.add_argument("--decay", choices=("linear", "constant"), default="linear", help="schedule of our learning rate")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-3)
    add_device_arguments(parser, dtype=False)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data = make_data(args.data, args.shared, args.length, args.view)
    for model in args.models:
        results = []
        for seed in range(args.seeds):
            own = "" if model == MODELS[0] else f"_{args.view}_{args.decay}" + ("" if args.decay == "constant" else str(args.epochs))
            path = args.folder / f"{args.data}_{model.replace(' ', '_')}_{args.length}_{args.dim}_{args.dropout}{own}_{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(run(model, make_data(args.data, args.shared, args.length, args.view), args, seed)))
            results.append(json.loads(path.read_text()))
        cells = []
        for name in ("hr_10", "ndcg_10"):
            values = [result[name] for result in results]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}")
        epochs = ", ".join(str(int(result["epoch"])) for result in results)
        sys.stdout.write(f"| {args.data}, {len(data.test_dataset)} rows | {model} | {' | '.join(cells)} | {epochs} |\n")


if __name__ == "__main__":
    main()
