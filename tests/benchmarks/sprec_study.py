"""Compare SPRec, supervised fine-tuning, and DPO, S-DPO and alpha-DPO on random negatives: equal data, equal steps, several seeds.

    OMP_NUM_THREADS=1 python tests/benchmarks/sprec_study.py --seeds 3 --jobs 2 --folder runs/study

For each seed, one model is trained by sft/movielens.yaml (the warm-up). All arms start from its weights and train for the same rounds on the same
rows. ``sft`` uses supervised epochs in both phases of a round, ``dpo``, ``softmax_dpo`` (three rejected titles) and ``alpha_dpo`` reject random
titles, and ``sprec`` rejects titles that the model generated.
The last lines are the table of configs/sprec/README.md: mean and standard deviation over the seeds. A run that is already in the folder is not
repeated; use one folder for each device.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import yaml
from devices import add_device_arguments

METRICS = ("ndcg_10", "hr_10", "div_ratio_10", "or_ratio_10", "mgu_10", "dgu_10")
SAMPLE = {"negatives": {"class_path": "SelfPlay", "init_args": {"decode": "sample"}}}
LOSSES = "malleable.lightning_modules.losses"
SOFTMAX = {"class_path": f"{LOSSES}.preference.SoftmaxDPO", "init_args": {"beta": 4.0}}
ADAPTIVE = {"class_path": f"{LOSSES}.adaptive_margin.AdaptiveMargin", "init_args": {"beta": 2.5, "gamma_beta_ratio": 0.15, "alpha": 0.05}}
ARMS = {
    "sft": {"negatives": "Uniform", "sft": {"epochs": 2}, "dpo": {"epochs": 0}},
    "dpo": {"negatives": "Uniform"},
    "softmax_dpo": {"negatives": {"class_path": "Uniform", "init_args": {"num_negatives": 3}}, "loss": SOFTMAX},
    "alpha_dpo": {"negatives": "Uniform", "loss": ADAPTIVE},
    "sprec": SAMPLE,
    "dpo, beta 0.1": {"negatives": "Uniform", "beta": 0.1},
    "sprec, beta 0.1": SAMPLE | {"beta": 0.1},
    "sprec, greedy, beta 0.1": {"negatives": "SelfPlay", "beta": 0.1},
}


def run(folder: Path, recipe: str, seed: int, settings: dict) -> dict[str, float]:
    """Fit and test a recipe in a separate folder, and return the test metrics of its report. A run that is already in the folder is not repeated."""
    found = sorted(folder.glob("runs/**/report/metrics.json"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "malleable", "fit", "--config", recipe, "--config", "settings.yaml", "--seed_everything", str(seed)]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True, env={**os.environ, "MPLBACKEND": "Agg"})
        found = sorted(folder.glob("runs/**/report/metrics.json"))
    return {key.removeprefix("test_"): value for key, value in json.loads(found[-1].read_text()).items() if key.startswith("test_")}


def trainer_settings(options: argparse.Namespace) -> dict:
    """Return the settings of the Trainer in all runs."""
    accelerator = "gpu" if options.device.startswith("cuda") else "cpu"
    return {"accelerator": accelerator, "devices": 1, "limit_val_batches": 0, "enable_progress_bar": False}


def arm_settings(model: Path, arm: dict, options: argparse.Namespace, seed: int) -> dict:
    """Return the values of sprec/movielens.yaml that an arm overrides."""
    phase = {"epochs": 1, "warmup_steps": options.warmup_steps, "batch_factor": options.batch_factor}
    sigmoid = {"class_path": f"{LOSSES}.preference.Sigmoid", "init_args": {"beta": arm.get("beta", options.beta)}}
    loop = {
        "rounds": options.rounds,
        "rows_per_round": options.rows,
        "compare_on": "none",
        "seed": seed,
        "warmup": {"epochs": 0},
        **{key: value for key, value in arm.items() if key not in ("beta", "loss")},
        "sft": phase | {"lr": options.lr} | arm.get("sft", {}),
        "dpo": phase | {"lr": options.dpo_lr} | arm.get("dpo", {}),
    }
    return {
        "model": {"init_args": {"language_model": {"name": str(model)}, "loss": arm.get("loss", sigmoid)}},
        "data": {"init_args": {"tokenizer": str(model)}},
        "trainer": {
            **trainer_settings(options),
            "callbacks": [{"class_path": "SelfPlayLoop", "init_args": loop}, {"class_path": "RunReport"}],
        },
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Format the results as a Markdown table."""
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
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--epochs", type=int, default=12, help="number of epochs of the warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048, help="number of rows of a round")
    parser.add_argument("--batch_factor", type=int, default=8, help="factor of the batch size; 8 gives steps of 64 rows")
    parser.add_argument("--warmup_steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dpo_lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=4.0)
    add_device_arguments(parser, dtype=False)
    options = parser.parse_args()
    folders = [options.folder.resolve() / f"seed_{seed}" for seed in range(options.seeds)]
    warm = {"trainer": {"max_epochs": options.epochs, **trainer_settings(options)}}
    jobs = [partial(run, folder / "warm-up", "sft/movielens.yaml", seed, warm) for seed, folder in enumerate(folders)]
    results = {"warm-up": at_once(jobs, options.jobs)}
    jobs = []
    for name in options.arms:
        for seed, folder in enumerate(folders):
            model = next((folder / "warm-up").glob("runs/**/model")).resolve()
            jobs.append(partial(run, folder / name, "sprec/movielens.yaml", seed, arm_settings(model, ARMS[name], options, seed)))
    figures = at_once(jobs, options.jobs)
    for number, name in enumerate(options.arms):
        results[name] = figures[number * options.seeds : (number + 1) * options.seeds]
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.folder / "study.json").write_text(json.dumps({"options": settings, "results": results}, indent=2))
    sys.stdout.write(table(results) + "\n")


def at_once(jobs: list[Callable[[], dict[str, float]]], count: int) -> list[dict[str, float]]:
    """Run the jobs, at most ``count`` at the same time, and return their results in order."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda job: job(), jobs))


if __name__ == "__main__":
    main()
