"""Measure the search for target vectors of many facts at a time against one fact at a time, and the memory of second moments.

    python tests/benchmarks/alpha_edit.py [--model NAME] [--facts 32] [--device cuda] [--json RESULT.json]

The other side of the comparison is a literal search (``tests/helpers/literal_targets.py``): one fact at a time, the whole model in every pass, logits
at every token, ``torch.optim.Adam``. The results of both sides must be equal. The facts are about countries. The default model is
SmolLM2-135M-Instruct (Q4_1, dequantised). The memory is measured in a separate process: the peak resident set size minus its value after the model
was loaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

os.environ["TQDM_DISABLE"] = "1"  # no progress bars between the lines of the output
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from devices import add_device_arguments, synchronize
from literal_targets import literal_target

from malleable.datamodules.files.fetch import resolve_model
from malleable.datamodules.language.tokenizer import load_tokenizer
from malleable.datamodules.sources.editing.countries import Countries
from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.prompts import PromptEncoder, generate_contexts
from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments
from malleable.lightning_modules.editing.targets import Fact, TargetSettings, find_targets

log = logging.getLogger("alpha_edit")

LAYERS = (4, 5, 6, 7, 8)
SETTINGS = StatisticsSettings(max_length=256, max_tokens=2048, piece=64)


def load(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """Load a model and its tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder, gguf_file = resolve_model(name)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model.to(device), load_tokenizer(name)


def compare(name: str, number: int, device: str = "cpu") -> dict[str, float]:
    """Compute the target vectors of facts with both implementations, and compare time and results."""
    model, tokenizer = load(name, device)
    encoder, layout = PromptEncoder(tokenizer), find_layout(model)
    settings = TargetSettings(lr=0.5, steps=25)
    requests = Countries(limit=number).load().requests
    facts = [Fact.from_request(request) for request in requests]

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    with evaluation_mode(model):
        contexts = ["{}", *generate_contexts(model, tokenizer)]
        find_targets(model, layout, LAYERS[-1], encoder, facts[:1], contexts, TargetSettings(steps=2))  # warm up
        start = clock()
        found = find_targets(model, layout, LAYERS[-1], encoder, facts, contexts, settings)
        ours = clock() - start
        start = clock()
        block = layout.block_of(model, LAYERS[-1])
        literal = [literal_target(model, block, encoder, fact, contexts, settings) for fact in facts]
        theirs = clock() - start
        start = clock()
        for fact in facts:
            find_targets(model, layout, LAYERS[-1], encoder, [fact], contexts, settings)
        single = clock() - start
    change = torch.stack([one.change for one in literal])
    differences = (found.change - change).norm(dim=1) / change.norm(dim=1).clamp_min(1e-9)
    steps = torch.tensor([one.steps for one in literal])
    log.info(
        "%s facts, %s contexts, %.1f steps for a fact on average (literal search: %.1f)",
        number,
        len(contexts),
        found.steps.float().mean(),
        steps.float().mean(),
    )
    log.info("relative differences of the target vectors: at most %.2g, median %.2g", differences.max(), differences.median())
    log.info(
        "seconds per fact: literal search %.2f, ours for one fact at a time %.2f, ours for all facts together %.2f",
        theirs / number,
        single / number,
        ours / number,
    )
    return {
        "literal_s": theirs,
        "single_s": single,
        "ours_s": ours,
        "ratio": theirs / ours,
        "largest_difference": float(differences.max()),
        "equal_steps": float((steps == found.steps.cpu()).float().mean()),
    }


def peak() -> float:
    """Return the peak resident set size of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pass_over(name: str, number: int, sender: Any) -> None:
    """Compute second moments over ``number`` texts, and send a tuple: increase of the peak memory in MiB, tokens, input width and hidden size."""
    model, tokenizer = load(name)
    sentences = Countries(limit=1).load().statements
    texts = [" ".join(sentences[start : start + 20]) for start in range(0, 20 * number, 20)]
    model(torch.zeros(1, 8, dtype=torch.long))
    before = peak()
    moments = second_moments(model, find_layout(model), LAYERS, tokenizer, texts, SETTINGS)
    sender.send((peak() - before, moments[LAYERS[0]].count, len(moments[LAYERS[0]].total), model.config.hidden_size))


def memory(name: str) -> dict[str, float]:
    """Measure the increase of the peak memory for 20 and for 200 texts."""
    grown = {}
    for number in (20, 200):
        receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=pass_over, args=(name, number, sender))
        process.start()
        grown[number], tokens, width, hidden = receiver.recv()
        process.join()
        log.info("second moments of %s layers over %s tokens: %.0f MiB above the model", len(LAYERS), tokens, grown[number])
    # In float64: two sums for each layer (all texts, current piece), the product of one chunk, and the activations of one pass.
    sums = (2 * len(LAYERS) + 2) * width * width * 8
    activations = SETTINGS.max_tokens * (len(LAYERS) * width + 3 * width + 12 * hidden) * 8
    bound = (sums + activations) / 2**20
    log.info("upper bound for any number of texts: %.0f MiB", bound)
    return {"few_mib": grown[20], "many_mib": grown[200], "bound_mib": bound}


def main() -> None:
    """Run both measurements, and print the ratio of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--json", type=Path)
    add_device_arguments(parser, dtype=False)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    # Memory is always measured in a process on the CPU. The device is used for the comparison only.
    result = {**memory(options.model), **compare(options.model, options.facts, options.device)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    sys.stdout.write(f"ratio: {result['ratio']:.2f}\n")


if __name__ == "__main__":
    main()
