"""Compare NFE with point embeddings: the same random search for each model, then the best trial with new seeds.

    OMP_NUM_THREADS=1 python tests/benchmarks/kg_study.py --data umls --trials 20 --jobs 2 --folder runs/kg_study

Each model is tuned with the same number of trials in the same search space: width of an entity's row (all its parts together), learning rate and
decay, batch size, initialisation, loss, dropout, regulariser or none, and the margin of distance models. The trial with the best filtered validation
MRR is trained again with seeds that the search did not use. Every run selects its best epoch on validation and uses early stopping. Training groups
equal queries, which is exact for both losses. The last lines are the table of configs/nfe/README.md: test metrics over both directions with
pessimistic ties, mean and standard deviation over the seeds. A run that is already in the folder is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from malleable import NFE, ComplEx, DistMult, KnowledgeGraphDataModule, RotatE, TransE
from malleable.datamodules.sources.graphs.published import UMLS, CoDExS, Kinship
from malleable.lightning_modules.functional.graphs.flows import NFE1, NFE2, NFE3
from malleable.lightning_modules.functional.graphs.points import ComplexDiagonal, Diagonal, Rotation, Translation
from malleable.lightning_modules.losses.embedding import DURA, F2, N3, BCESum, Softmax

GRAPHS: dict[str, Callable[..., Any]] = {"umls": UMLS, "kinship": Kinship, "codex_s": CoDExS}
MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    "NFE-1": (NFE, NFE1),
    "NFE-2": (NFE, NFE2),
    "NFE-3": (NFE, NFE3),
    "TransE": (TransE, Translation),
    "RotatE": (RotatE, Rotation),
    "DistMult": (DistMult, Diagonal),
    "ComplEx": (ComplEx, ComplexDiagonal),
}
LOSSES: dict[str, Callable[[], Any]] = {"BCESum": BCESum, "Softmax": Softmax}
REGULARISERS: dict[str, Callable[[float], Any]] = {"N3": N3, "F2": F2, "DURA": DURA}


class Space(NamedTuple):
    """Search space of a graph, which is the same for all models.

    Attributes:
        widths: Widths of an entity's row. The one, two or three parts of the row have equal shares of the width.
        lr: Lower and upper bound of the learning rate.
        batches: Numbers of queries in a batch.
        decays: Factors of the learning rate after each epoch.
        losses: Names in :data:`LOSSES`.
        dropouts: Dropout rates. A rate that occurs twice is drawn twice as often.
        distances: Regularisers of models whose score is a distance; ``None`` for no regulariser.
        products: Regularisers of the other models, whose score is a product; ``None`` for no regulariser.
        weight: Lower and upper bound of the weight of the regulariser.
    """

    widths: tuple[int, ...] = (96, 192, 384)
    lr: tuple[float, float] = (1e-3, 3e-2)
    batches: tuple[int, ...] = (32, 64, 128, 256)
    decays: tuple[float, ...] = (0.93, 0.96, 0.98, 1.0)
    losses: tuple[str, ...] = ("BCESum", "Softmax")
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.1, 0.2, 0.3, 0.4)
    distances: tuple[str | None, ...] = (None, "F2", "DURA")
    products: tuple[str | None, ...] = (None, "N3", "DURA")
    weight: tuple[float, float] = (1e-4, 0.3)


SPACES = {
    "umls": Space(),
    "kinship": Space(),
    # Chosen after pilot runs of NFE-1, DistMult and ComplEx: the binary loss was much worse, a regulariser improved all models, and the best settings
    # were within these bounds.
    "codex_s": Space(
        widths=(256, 384),
        lr=(5e-3, 3e-2),
        batches=(128, 256),
        decays=(0.93, 0.96),
        losses=("Softmax",),
        dropouts=(0.0, 0.0, 0.1),
        distances=("F2", "N3", "DURA"),
        products=("F2", "N3", "DURA"),
        weight=(2e-3, 1e-1),
    ),
}
METRICS = ("mrr", "hits_1", "hits_10")


def drawn(model: str, data: str, trial: int) -> dict[str, Any]:
    """Draw the settings of a trial. All models get the same values for the same trial. Settings that a model does not have are omitted."""
    rng = np.random.default_rng(trial)
    space, distance = SPACES[data], MODELS[model][1].distance

    def choice(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    def between(low: float, high: float) -> float:
        return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.2g}")

    settings = {
        "width": choice(*space.widths),
        "lr": between(*space.lr),
        "lr_decay": choice(*space.decays),
        "batch": choice(*space.batches),
        "init": choice("uniform", "normal"),
        "scale": between(1e-2, 0.5),
        "loss": choice(*space.losses),
        "dropout": choice(*space.dropouts),
        "gamma": choice(0.0, 1.0, 2.0, 4.0, 8.0, 12.0),
        "regulariser": choice(*(space.distances if distance else space.products)),
        "weight": between(*space.weight),
    }
    if not distance:
        del settings["gamma"]
    if settings["regulariser"] is None:
        del settings["weight"]
    return settings


def make(model: str, settings: dict[str, Any]) -> Any:
    """Return the module of a model with the settings of a trial."""
    kind, interaction = MODELS[model]
    arguments = {name: settings[name] for name in ("gamma", "dropout") if name in settings}
    if kind is NFE:
        arguments["kind"] = model.replace("-", "").lower()
    return kind(
        dimension=settings["width"] // len(interaction.entity_parts),
        loss=LOSSES[settings["loss"]](),
        regulariser=REGULARISERS[settings["regulariser"]](settings["weight"]) if settings["regulariser"] else None,
        init={"kind": settings["init"], "scale": settings["scale"]},
        tuning={"lr": settings["lr"], "lr_decay": settings["lr_decay"]},
        **arguments,
    )


class BestEpoch(Callback):
    """Keep the weights of the best validation MRR, and stop a run if the MRR does not improve.

    Args:
        patience: Number of validations without improvement after which the run stops.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.mrr, self.epoch, self.waited = -1.0, -1, 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights if the validation MRR is the best so far; stop the run if there was no improvement for ``patience`` validations."""
        mrr = trainer.callback_metrics["val_mrr"].item()
        self.waited += 1
        if mrr > self.mrr:
            self.mrr, self.epoch, self.waited = mrr, trainer.current_epoch + 1, 0
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        trainer.should_stop = self.waited >= self.patience


def run(path: Path, model: str, settings: dict[str, Any], seed: int, test: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model, test it if ``test`` is set, and return the figures. If the file already contains this run, its figures are returned."""
    plan = {"settings": settings, "seed": seed, "epochs": options.epochs, "every": options.every, "patience": options.patience}
    # Default values are omitted, so that files of earlier versions, which did not have these options, remain valid.
    plan |= {name: value for name, value in (("device", options.device), ("precision", options.precision)) if value not in ("cpu", "32-true")}
    if path.exists() and (done := json.loads(path.read_text(encoding="utf-8")))["plan"] == plan:
        return done["figures"]
    quiet()
    start = time.perf_counter()
    figures = trained(model, settings, seed, test, options) | {"seconds": round(time.perf_counter() - start, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"plan": plan, "figures": figures}, indent=1), encoding="utf-8")
    sys.stdout.write(f"{path.relative_to(options.folder)}: {figures}\n")
    sys.stdout.flush()
    return figures


def trained(model: str, settings: dict[str, Any], seed: int, test: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model, and return the figures of the best epoch."""
    seed_everything(seed, verbose=False)
    source = GRAPHS[options.data](path=options.path)
    data = KnowledgeGraphDataModule(source, group_queries=True, batch_size=settings["batch"], eval_batch_size=512, seed=seed)
    where = {"accelerator": "gpu" if options.device == "cuda" else "cpu", "devices": 1, "precision": options.precision}
    module, best = make(model, settings), BestEpoch(options.patience)
    off: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=options.epochs, check_val_every_n_epoch=options.every, num_sanity_val_steps=0, callbacks=[best], **where, **off)
    try:
        trainer.fit(module, datamodule=data)
    except ValueError as error:
        # The ranking raises this error for scores that are not finite. The best epoch before the divergence is used.
        if "diverged" not in str(error):
            raise
    figures: dict[str, Any] = {"val_mrr": best.mrr, "epoch": best.epoch}
    if test and best.weights:
        module.load_state_dict(best.weights)
        (tested,) = Trainer(**where, **off).test(module, datamodule=data, verbose=False)
        figures |= {name: tested[f"test_{name}"] for name in METRICS}
    return figures


def quiet() -> None:
    """Suppress all output except results, and use one thread in each process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "malleable"):
        logging.getLogger(name).setLevel(logging.ERROR)


def table(results: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """Format the results as a Markdown table."""
    lines = ["| model | MRR | H@1 | H@10 | selected on validation |", "| --- | ---: | ---: | ---: | --- |"]
    for model, (settings, runs) in results.items():
        cells = []
        for metric in METRICS:
            values = [figures.get(metric, 0.0) for figures in runs]  # no value: the run diverged before its first validation
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        lines.append(f"| {model} | {' | '.join(cells)} | {chosen} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=GRAPHS, default="umls")
    parser.add_argument("--path", help="folder with train.txt, valid.txt and test.txt; default: the files are downloaded")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trials", type=int, default=20, help="number of trials of each model")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds for the best trial of each model")
    parser.add_argument("--epochs", type=int, default=100, help="maximum number of epochs of a run")
    parser.add_argument("--every", type=int, default=5, help="number of epochs between validations")
    parser.add_argument("--patience", type=int, default=4, help="number of validations without improvement after which a run stops")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="32-true", help="precision of the Trainer")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/kg_study"))
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    home = options.folder / options.data
    # Use `spawn`, because a forked process can hang in the threads of torch.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        trials = {
            (model, trial): pool.submit(run, home / model / f"trial_{trial}.json", model, drawn(model, options.data, trial), 0, False, options)
            for trial in range(options.trials)
            for model in options.models
        }
        chosen = {}
        for model in options.models:
            best = max(range(options.trials), key=lambda trial, model=model: trials[model, trial].result()["val_mrr"])
            chosen[model] = drawn(model, options.data, best)
        seeds = {
            model: [
                pool.submit(run, home / model / f"seed_{seed}.json", model, chosen[model], seed, True, options)
                for seed in range(1, 1 + options.seeds)
            ]
            for model in options.models
        }
        results = {model: (chosen[model], [job.result() for job in seeds[model]]) for model in options.models}
    settings = {key: str(value) for key, value in vars(options).items()}
    (home / "study.json").write_text(json.dumps({"options": settings, "results": results}, indent=1), encoding="utf-8")
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
