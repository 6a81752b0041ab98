"""Compare AlphaEdit with its baselines (no projection, MEMIT, fine-tuning) on the same facts in the same order.

    python tests/benchmarks/alpha_edit_study.py --data smollm2 [--json RESULT.json]
    malleable fit --config alpha_edit/tiny.yaml
    malleable patch revert runs/alpha_edit/tiny/version_0/model --out unedited  # the run exports the edited model
    python tests/benchmarks/alpha_edit_study.py --data tiny --model unedited

Every method is tuned with the same number of settings on facts of a separate seed. The setting with the highest harmonic mean of efficacy,
generalization, specificity and exact specificity is selected and evaluated on the facts of three other seeds. All methods use the same second
moments.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # no progress bars between the lines of the output

import torch
from devices import add_device_arguments, describe, synchronize

from malleable.datamodules.editing.datamodule import EditingDataModule
from malleable.datamodules.editing.requests import EditRequest
from malleable.datamodules.files.fetch import resolve_model
from malleable.datamodules.sources.editing.countries import Countries
from malleable.datamodules.sources.editing.texts import WordNetGlosses
from malleable.lightning_modules.editing.editor import AlphaEditor
from malleable.lightning_modules.editing.evaluation import Protocol, evaluate_edits
from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
from malleable.lightning_modules.editing.fine_tune import FineTuneSettings
from malleable.lightning_modules.editing.known import KnownFacts, known_requests
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments
from malleable.lightning_modules.editing.targets import Fact, TargetSettings
from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold
from malleable.lightning_modules.functional.editing.second_moments import SecondMoment

log = logging.getLogger("alpha_edit_study")

TUNING_SEED, SEEDS = 100, (0, 1, 2)
SHOWN = ("efficacy", "efficacy_exact", "generalization", "specificity", "specificity_exact", "perplexity_ratio", "seconds")


@dataclass
class Setup:
    """Facts to edit, and settings to try.

    Attributes:
        common: Settings that all methods use.
        facts: Number of facts of an evaluated run.
        tuned_on: Number of facts of a tuning run.
        trials: Settings to try, by method. They are added to the common settings.
        source: Arguments of the source :class:`Countries`.
    """

    common: dict[str, Any]
    facts: int
    tuned_on: int
    trials: dict[str, list[dict[str, Any]]]
    source: dict[str, Any] = field(default_factory=dict)


def trials(
    thresholds: Sequence[Threshold], ridges: Sequence[float], weights: Sequence[float], rates: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
    """Return the settings to try, by method; the number is the same for all methods."""
    found: dict[str, list[dict[str, Any]]] = {
        "AlphaEdit": [{"method": "alpha_edit", "threshold": threshold, "ridge": ridge} for threshold in thresholds for ridge in ridges],
        "no projection (P = I)": [{"method": "ridge", "ridge": ridge} for ridge in weights],
        "MEMIT": [{"method": "memit", "moment_weight": weight} for weight in weights],
        "fine-tuning": [{"method": "fine_tune", "tuning": FineTuneSettings(lr=rate)} for rate in rates],
    }
    assert len({len(own) for own in found.values()}) == 1
    return found


SETUPS = {
    "smollm2": Setup(
        {"layers": (4, 5, 6, 7, 8), "batch_size": 5, "targets": TargetSettings(lr=0.5, steps=25)},
        30,
        10,
        trials(
            [Threshold("absolute", value) for value in (1e-2, 2e-2, 5e-2)], (1, 10), (1, 10, 100, 1e3, 1e4, 1e5), (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
        ),
        {"relations": ["capital", "language", "country"], "limit": 250, "neighbors": 24},
    ),
    "tiny": Setup(
        {
            "fact_token": "last",
            "layers": (2, 3),
            "batch_size": 20,
            "contexts": 0,
            "targets": TargetSettings(lr=0.1, steps=60, clamp=1.5, decay=0.5, stop=0.1),
        },
        200,
        100,
        trials(
            [Threshold("relative_energy", value) for value in (0.02, 0.05, 0.1)],
            (0.03, 0.3),
            (1e-2, 1e-1, 1, 10, 100, 1e3),
            (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
        ),
        {"relations": ["continent", "currency", "language"], "limit": 200, "hold_out": True},
    ),
}


class Bench:
    """Model with its second moments, on which edits are run.

    Args:
        name: Name of the model.
        setup: Facts to edit, and settings to try.
        texts: Whether edits preserve general text; otherwise, they preserve sentences of facts that no request changes.
        device: Device of the model.
    """

    def __init__(self, name: str, setup: Setup, texts: bool, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.setup, self.name, self.device = setup, name, device
        folder, gguf_file = resolve_model(name)
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().to(device)
        self.texts = WordNetGlosses(limit=700) if texts else None
        self.moments: dict[int, dict[int, SecondMoment]] = {}
        self.before: dict[int, float] = {}

    def data(self, seed: int) -> EditingDataModule:
        """Return the data module with facts and texts for a seed."""
        source = Countries(**self.setup.source, seed=seed)
        data = EditingDataModule(source, texts=self.texts, tokenizer=self.name, retain_statements=self.texts is None)
        data.setup("test")
        return data

    def run(self, data: EditingDataModule, requests: list[EditRequest], seed: int, trial: dict[str, Any]) -> dict[str, float]:
        """Edit, evaluate, and revert the edits; return the metrics."""
        editor = AlphaEditor(self.model, data.tokenizer, EditSettings(**{**self.setup.common, **trial, "seed": seed}))
        if editor.settings.needs_text:
            if seed not in self.moments:
                with evaluation_mode(self.model):
                    found = second_moments(self.model, editor.layout, editor.layers, data.tokenizer, data.edit_texts, StatisticsSettings())
                # General text does not depend on the seed.
                self.moments |= {seed: found} if self.texts is None else dict.fromkeys((*SEEDS, TUNING_SEED), found)
            editor.use_moments(self.moments[seed])
        protocol = Protocol(texts=40, writing=0, answers=0)
        if seed not in self.before:
            self.before[seed] = evaluate_edits(self.model, data.tokenizer, requests, data.measured_texts, protocol).figures["perplexity"]
        synchronize(self.device)
        start = time.perf_counter()
        try:
            editor.edit(list(map(Fact.from_request, requests)))
            after = evaluate_edits(self.model, data.tokenizer, requests, data.measured_texts, protocol).figures
        finally:
            editor.revert()
        after["perplexity_ratio"] = after["perplexity"] / self.before[seed]
        synchronize(self.device)
        after["seconds"] = time.perf_counter() - start
        return after

    def known(self, data: EditingDataModule, number: int, seed: int) -> list[EditRequest]:
        """Return requests for facts that the model answers correctly, in the order of the seed."""
        return known_requests(self.model, data.tokenizer, data.edit_requests, KnownFacts(min_neighbors=3, limit=number))


def worth(figures: dict[str, float]) -> float:
    """Return the score by which settings are selected: a harmonic mean of four metrics."""
    values = [figures[name] for name in ("efficacy", "generalization", "specificity", "specificity_exact")]
    return len(values) / sum(1 / max(value, 1e-9) for value in values)


def said(figures: dict[str, float]) -> str:
    """Format metrics in one line."""
    return ", ".join(f"{name} {figures[name]:.4g}" for name in SHOWN)


def study(bench: Bench, chosen: Sequence[str]) -> dict[str, Any]:
    """Tune every method, and compare the methods with the selected settings."""
    setup, result = bench.setup, {}
    data = bench.data(TUNING_SEED)
    requests = bench.known(data, setup.tuned_on, TUNING_SEED)
    log.info("tuning on %s facts", len(requests))
    best: dict[str, dict[str, Any]] = {}
    for method in chosen:
        tried = []
        for trial in setup.trials[method]:
            try:
                figures = bench.run(data, requests, TUNING_SEED, trial)
            except ValueError as error:
                log.info("%s %s: %s", method, trial, error)
                continue
            log.info("%s %s: %.1f (%s)", method, trial, worth(figures), said(figures))
            tried.append((worth(figures), trial))
        best[method] = max(tried, key=lambda one: one[0])[1]
    for seed in SEEDS:
        data = bench.data(seed)
        requests = bench.known(data, setup.facts, seed)
        for method in chosen:
            figures = bench.run(data, requests, seed, best[method])
            log.info("seed %s, %s facts, %s %s: %s", seed, len(requests), method, best[method], said(figures))
            result.setdefault(method, []).append(figures)
    log.info("| method | %s |", " | ".join(SHOWN))
    for method, runs in result.items():
        cells = [f"{statistics.mean(own):.4g} ± {statistics.stdev(own):.2g}" for own in ([run[name] for run in runs] for name in SHOWN)]
        log.info("| %s | %s |", method, " | ".join(cells))
    return {"best": {method: str(trial) for method, trial in best.items()}, "runs": result}


def main() -> None:
    """Run a study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETUPS, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--methods", nargs="+", help="Prefixes of names; default: all.")
    parser.add_argument("--json", type=Path)
    add_device_arguments(parser, dtype=False)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    setup = SETUPS[options.data]
    chosen = [name for name in setup.trials if not options.methods or any(name.startswith(word) for word in options.methods)]
    log.info("%s on %s", options.model, describe(options.device))
    result = study(Bench(options.model, setup, options.data == "smollm2", options.device), chosen)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
