"""Compare SFT, DPO, SimPO and alpha-DPO on pairs of real labelled text: equal pairs, steps and number of trials, several seeds.

    OMP_NUM_THREADS=1 python tests/benchmarks/preference_study.py --folder runs/preferences [--shared FOLDER] [--seeds 3]

Data: questions about products and attributes of the products, labelled as answering the question or not (semiPQA, in ``search/product_qa`` of
``--shared``). A pair is an attribute that answers the question, and one that does not. The development file is split by question into training and
validation pairs, and the pairs of the other file are the test pairs; questions in both files are left out of training.

A model is trained from scratch on all questions with all attributes, without the labels. All methods start from it and train for the same number of
steps. Each method has the same number of trials on the first seed (learning rates), of which the one with the best validation accuracy is used for
all seeds. The accuracy compares rewards of the method: log-ratios to the reference for DPO, mean log-probabilities per token for SFT and SimPO, and a
mixture of them for alpha-DPO. ``shuffled`` is the control experiment: half of the training pairs are reversed, and log-ratios are compared.

A run that is already in the folder is not repeated. The last lines are a table: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from devices import add_device_arguments
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from malleable import (
    DPO,
    SFT,
    AdaptiveMargin,
    AlphaDPO,
    AnswerSamples,
    LanguageModelConfig,
    PreferenceDataModule,
    PreferenceFile,
    PreferenceSplit,
    ReferenceCache,
    Scratch,
    Sigmoid,
    SimPO,
    Tuning,
)

METHODS = ("SFT", "DPO", "SimPO", "alpha-DPO", "DPO, shuffled", "alpha-DPO, shuffled")
RATES = (1e-4, 3e-4, 1e-3)
LIMITS = {"train_limit": 6000, "val_limit": 600, "test_limit": 3000}
COLUMNS = ("accuracy", "mean_logps_accuracies", "answer_tokens", "kl")


def read_questions(path: Path) -> dict[str, dict[int, list[str]]]:
    """Return the attributes of each question, by label."""
    questions: dict[str, dict[int, list[str]]] = defaultdict(lambda: {0: [], 1: []})
    with gzip.open(path) as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8"), delimiter="\t"):
            questions[row["question"].strip()][int(float(row["label"]))].append(row["candidate"].strip())
    return questions


def write_rows(shared: Path, folder: Path) -> None:
    """Write the pairs, and all questions with all attributes, as JSON lines."""
    test, train = (read_questions(shared / f"search/product_qa/semiPQA_attribute_ranking_{name}.csv.gz") for name in ("testseen", "dev"))
    train = {question: found for question, found in train.items() if question not in test}
    for name, questions in (("train", train), ("test", test)):
        pairs = [
            {"prompt": f"{question}\n", "chosen": good, "rejected": bad}
            for question, found in questions.items()
            for good in found[1]
            for bad in found[0]
            if good != bad
        ]
        write_lines(folder / f"{name}.jsonl", pairs)
    texts = [
        {"prompt": f"{question}\n", "completion": text, "label": True}
        for question, found in train.items()
        for text in dict.fromkeys(found[0] + found[1])
    ]
    write_lines(folder / "texts.jsonl", texts)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path, tokenizer: str | None, batch_size: int, **changes: Any) -> PreferenceDataModule:
    """Return the pairs, or the unlabelled texts without a tokenizer."""
    if tokenizer is None:
        source = PreferenceFile(str(folder / "texts.jsonl"))
    else:
        source = PreferenceFile(str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
    split = PreferenceSplit(val_size=0.1, test_size=0.01 if tokenizer is None else None, **({} if tokenizer is None else LIMITS))
    options = {"vocab_size": 2048, "max_length": 192, "batch_size": batch_size, "eval_batch_size": 64}
    return PreferenceDataModule(source, tokenizer, split=split, **options, **changes)


def make_trainer(folder: Path, epochs: int, device: str, callbacks: list[Any]) -> Trainer:
    """Return a quiet Trainer."""
    return Trainer(
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        max_epochs=epochs,
        logger=CSVLogger(folder, name="", version="run"),
        callbacks=callbacks,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


def pretrain(folder: Path, args: argparse.Namespace, seed: int) -> Path:
    """Train a model on the unlabelled texts, unless it exists, and return its folder."""
    target = folder / f"base_{seed}"
    if not (target / "run/model").is_dir():
        seed_everything(seed)
        size = Scratch(hidden_size=args.dim, num_layers=args.layers, num_heads=4, max_length=256, dropout=0.1)
        module = SFT(LanguageModelConfig(scratch=size), tuning=Tuning(lr=2e-3, warmup_steps=50, decay="cosine"))
        data = make_data(folder, None, 32, train_view="chosen", seed=seed)
        make_trainer(target, args.base_epochs, args.device, []).fit(module, data)
    return target / "run/model"


def make_module(method: str, base: Path, rate: float) -> LightningModule:
    """Return the module of a method."""
    name, tuning = method.partition(",")[0], Tuning(lr=rate, warmup_steps=20, decay="cosine")
    model = LanguageModelConfig(name=str(base))
    if name == "SFT":
        return SFT(model, tuning=tuning)
    if name == "alpha-DPO":
        return AlphaDPO(model, loss=AdaptiveMargin(beta=2.0, gamma_beta_ratio=0.25, alpha=0.1), tuning=tuning)
    return DPO(model, loss=SimPO(beta=2.0, gamma_beta_ratio=0.25) if name == "SimPO" else Sigmoid(beta=0.1), tuning=tuning)


def run(folder: Path, args: argparse.Namespace, method: str, seed: int, rate: float) -> dict[str, float]:
    """Train and test a method, unless its figures exist."""
    path = folder / f"{method.replace(', ', '_')}_{rate}_{seed}.json"
    if not path.is_file():
        base = pretrain(folder, args, seed)
        seed_everything(seed)
        shuffled = method.endswith("shuffled")
        view = "chosen" if method == "SFT" else "preference"
        data = make_data(folder, str(base), args.batch_size, train_view=view, label_noise=0.5 if shuffled else 0.0, seed=seed)
        samples = AnswerSamples(num_prompts=128, max_new_tokens=96, num_shown=0)
        trainer = make_trainer(folder / path.stem, args.epochs, args.device, [samples, *([] if method == "SFT" else [ReferenceCache()])])
        module = make_module(method, base, rate)
        trainer.fit(module, data)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures |= {name: float(value) for name, value in trainer.test(module, data, verbose=False)[0].items()}
        path.write_text(json.dumps({"steps": trainer.global_step} | figures, indent=1))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def accuracy(figures: dict[str, float], method: str, split: str) -> float:
    """Return the accuracy of the rewards of a method; of log-ratios in the control experiment."""
    if method == "SFT":
        return figures[f"{split}_mean_logps_accuracies"]
    return figures[f"{split}_gap_accuracies" if method == "alpha-DPO, shuffled" else f"{split}_rewards_accuracies"]


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder with the data sets")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    for name, value in {"seeds": 3, "dim": 96, "layers": 3, "batch_size": 32, "epochs": 1, "base_epochs": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    add_device_arguments(parser, dtype=False)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.shared, folder)
    for method in args.methods:
        trials = {rate: accuracy(run(folder, args, method, 0, rate), method, "val") for rate in RATES} if "shuffled" not in method else {3e-4: 0.5}
        best = max(trials, key=lambda rate: trials[rate])
        results = [run(folder, args, method, seed, best) for seed in range(args.seeds)]
        rows = [{"accuracy": accuracy(figures, method, "test")} | {name: figures[f"test_{name}"] for name in COLUMNS[1:]} for figures in results]
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in rows]
            digits = 3 if "accurac" in name else 1
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}")
        sys.stdout.write(f"| {method} | {best:.0e} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
