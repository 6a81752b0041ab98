"""SPRec against supervised tuning and against DPO with random negatives: equal data, equal steps, several seeds.

    python tests/benchmarks/sprec_study.py --seeds 3 --folder runs/study

For each seed one model is warmed up (sft/movielens.yaml); then the arms go on from its weights with the same rounds of the same rows:
``sft`` spends both phases of a round on supervised epochs, ``dpo`` rejects random titles, ``sprec`` rejects the model's own. The last lines are
the table of the README: mean and standard deviation over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

METRICS = ("ndcg_10", "hr_10", "div_ratio_10", "or_ratio_10", "mgu_10", "dgu_10")
ARMS = {
    "sft": {"negative_source": "random", "sft": {"epochs": 2}, "dpo": {"epochs": 0}},
    "dpo": {"negative_source": "random"},
    "sprec": {"negative_source": "pre_round", "play": {"decode": "sample"}},
    "sprec, greedy": {"negative_source": "pre_round"},
}


def run(folder: Path, recipe: str, seed: int, settings: dict) -> dict[str, float]:
    """Fit and test a recipe in a folder of its own, unless it was done before; return the report's figures."""
    found = sorted(folder.glob("runs/**/report/metrics.json"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "malleable", "fit", "--config", recipe, "--config", "settings.yaml", "--seed_everything", str(seed)]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True, env={**os.environ, "MPLBACKEND": "Agg"})
        found = sorted(folder.glob("runs/**/report/metrics.json"))
    return {key.removeprefix("test_"): value for key, value in json.loads(found[-1].read_text()).items() if key.startswith("test_")}


def arm_settings(model: Path, arm: dict, options: argparse.Namespace, seed: int) -> dict:
    """What an arm changes in sprec/movielens.yaml."""
    phase = {"lr": options.lr, "epochs": 1}
    loop = {
        "rounds": options.rounds,
        "rows_per_round": options.rows,
        "compare_on": "none",
        "seed": seed,
        "warmup": {"epochs": 0},
        **arm,
        "sft": phase | arm.get("sft", {}),
        "dpo": {"lr": options.dpo_lr, "epochs": 1} | arm.get("dpo", {}),
    }
    loss = {"class_path": "malleable.lightning_modules.losses.preference.Sigmoid", "init_args": {"beta": options.beta}}
    return {
        "model": {"init_args": {"language_model": {"name": str(model)}, "loss": loss}},
        "data": {"init_args": {"tokenizer": str(model)}},
        "trainer": {
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "SelfPlayLoop", "init_args": loop}, {"class_path": "RunReport"}],
        },
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The README's table."""
    lines = ["| model | NDCG@10 ↑ | HR@10 ↑ | DivRatio@10 ↑ | ORRatio@10 ↓ | MGU@10 ↓ | DGU@10 ↓ |", "| --- |" + " ---: |" * len(METRICS)]
    for name, runs in results.items():
        cells = []
        for metric in METRICS:
            values = [figures[metric] for figures in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--epochs", type=int, default=8, help="of the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dpo_lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=1.0)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"warm-up": [], **{name: [] for name in ARMS}}
    for seed in range(options.seeds):
        folder = options.folder.resolve() / f"seed_{seed}"
        warm = {"trainer": {"max_epochs": options.epochs, "limit_val_batches": 0, "enable_progress_bar": False}}
        results["warm-up"].append(run(folder / "warm-up", "sft/movielens.yaml", seed, warm))
        model = next((folder / "warm-up").glob("runs/**/model")).resolve()
        for name, arm in ARMS.items():
            results[name].append(run(folder / name, "sprec/movielens.yaml", seed, arm_settings(model, arm, options, seed)))
        sys.stdout.write(f"after {seed + 1} seeds\n{table(results)}\n")
        sys.stdout.flush()
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.folder / "study.json").write_text(json.dumps({"options": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
