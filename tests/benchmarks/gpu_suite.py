"""Benchmarks on a GPU, in parts of about one minute each.

    python tests/benchmarks/gpu_suite.py [--parts preference-16 decoding-1b ...] [--list] [--json RESULT.json]
    python tests/benchmarks/gpu_suite.py --device cpu --tiny

Each part prints its figures and ``ratio:`` lines. A ratio is the time of the other program divided by the time of this package. A part ends when its
time budget is used up. All parts together take at most 8 minutes on an H100. Weights are random. ``--tiny`` reduces the size of every part, to check
that it runs. ``--movielens`` and ``--fb15k237`` are folders of data for machines without internet access.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from devices import DTYPES, KernelShare, describe, synchronize
from lightning.pytorch import seed_everything

log = logging.getLogger("gpu_suite")

FOLDER = Path(__file__).resolve().parent
Part = Callable[[argparse.Namespace], dict[str, Any]]
# Shapes of published models: SmolLM2-135M and Llama-3.2-1B.
SMALL = {"layers": 30, "width": 576, "heads": 9, "key_value_heads": 3, "intermediate": 1536, "vocab_size": 49_152}
BILLION = {"layers": 16, "width": 2048, "heads": 32, "key_value_heads": 8, "intermediate": 8192, "vocab_size": 128_256}
TINY = {"layers": 2, "width": 32, "heads": 4, "key_value_heads": 2, "intermediate": 64, "vocab_size": 512}


def preference(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Measure preference steps of a model with 1 B parameters against TRL with its fastest settings."""
    import preference_step
    from datasets import disable_progress_bars

    disable_progress_bars()
    shape = TINY if options.tiny else BILLION
    setting = preference_step.Setting(
        f"{'tiny' if options.tiny else '1 B'}, batch {batch_size}",
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_value_heads"],
        intermediate_size=shape["intermediate"],
        vocab_size=shape["vocab_size"],
        batch_size=2 if options.tiny else batch_size,
        steps=2 if options.tiny else 8,
        warmup=1 if options.tiny else 3,
        device=options.device,
        dtype=options.dtype,
    )
    figures = preference_step.measure(setting, repeats=1, compact=False)
    preference_step.report(figures)
    return {
        "step_s": figures["ours"]["wall_s"],
        "trl_step_s": figures["trl"]["wall_s"],
        "peak_gib": figures["peak_gib"],
        "ratio": figures["trl_ratio"],
    }


@torch.no_grad()
def decode(options: argparse.Namespace, shape: dict[str, int]) -> dict[str, Any]:
    """Measure beam search over titles against constrained and free ``generate``, for prompt widths that are new or were used before."""
    import decoding

    from malleable.lightning_modules.functional.language.attention import avoid_planned_kernels
    from malleable.lightning_modules.functional.language.trie import Trie

    avoid_planned_kernels()
    counts = {"batch_size": 2, "num_prompts": 4, "num_items": 50, "num_beams": 3, "k": 3} if options.tiny else {"num_beams": 10, "num_prompts": 48}
    setting = decoding.Setting("beams", **counts, **(TINY if options.tiny else shape), device=options.device, dtype=options.dtype)
    model, titles, data = decoding.prepare(setting, None)
    # Each batch has a different width. The first batch is used only to warm up.
    data = [(ids[:, 5 * number :], mask[:, 5 * number :]) for number, (ids, mask) in enumerate(data)]
    searches: dict[str, decoding.Search] = {
        "ours": partial(decoding.beam_search, model, Trie.build(titles).to(options.device), num_beams=setting.num_beams, k=setting.k),
        "generate": decoding.Generate(model, titles, setting),
        "free": decoding.Generate(model, titles, setting, constrained=False),
    }
    seconds: dict[str, dict[str, float]] = {}
    for search in searches.values():
        search(*data[0])
    for shapes in ("fresh", "repeated"):
        runs = [{name: decoding.timed(partial(search, *batch), options.device).wall_s for name, search in searches.items()} for batch in data[1:]]
        seconds[shapes] = {name: sum(run[name] for run in runs) / len(runs) for name in searches}
    figures: dict[str, Any] = {f"{name}_{shapes}_s": value for shapes, times in seconds.items() for name, value in times.items()}
    for shapes, times in seconds.items():
        figures[f"ratio to generate, {shapes} shapes"] = times["generate"] / times["ours"]
        figures[f"ratio to free beam search, {shapes} shapes"] = times["free"] / times["ours"]
    return figures


def sprec(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the quick start: seconds of the whole run, and the share of a step in which kernels run on the device."""
    from malleable.main import main

    words = ["fit", "--config", "sprec/tiny.yaml" if options.tiny else "sprec/movielens.yaml"]
    words += ["--trainer.accelerator", "gpu" if options.device.startswith("cuda") else "cpu", "--trainer.devices", "1"]
    words += ["--trainer.callbacks+=devices.KernelShare", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.callbacks.init_args.steps", "2" if options.tiny else "20"]
    if options.tiny:
        words += ["--trainer.callbacks.init_args.first", "2", "--test_after_fit", "false"]
    if options.movielens:
        words += ["--data.init_args.source.init_args.path", str(options.movielens)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        main(words)
        seconds = time.perf_counter() - start
    return {"run_s": seconds, **KernelShare.latest}


def tiny_graph(folder: Path) -> Path:
    """Write a random graph."""
    rng = random.Random(0)
    triples = [f"e{rng.randrange(30)}\tr{rng.randrange(3)}\te{rng.randrange(30)}" for _ in range(200)]
    distinct = list(dict.fromkeys(triples))
    for name, part in {"train": distinct[:-20], "valid": distinct[-20:-10], "test": distinct[-10:]}.items():
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    return folder


def graph(options: argparse.Namespace, models: list[str]) -> dict[str, Any]:
    """Measure epochs on FB15k-237 against PyKEEN (point embeddings) or the loop of the paper's code (NFE)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["--models", *models, "--json", str(folder / "figures.json"), "--repeats", "1"]
        if options.tiny:
            words += ["--data", "umls", "--path", str(tiny_graph(folder)), "--dimension", "4", "--batch", "8"]
        else:
            words += ["--data", "fb15k237", "--queries", "4096", "--dimension", "256", "--batch", "256"]
            words += ["--path", str(options.fb15k237)] if options.fb15k237 else []
        if options.device != "cpu":
            words += ["--device", options.device]
        run_script("kg_epoch.py", words)
        return {"figures": json.loads((folder / "figures.json").read_text(encoding="utf-8"))}


def run_script(name: str, words: list[str]) -> None:
    """Run a program of this folder with the given arguments."""
    before, sys.argv = sys.argv, [name, *words]
    try:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    finally:
        sys.argv = before


def alpha_edit(options: argparse.Namespace) -> dict[str, Any]:
    """Measure second moments and the targets of 100 facts with 1 B random weights. The literal search is measured on two of the facts."""
    import alpha_edit as program
    import decoding

    from malleable.datamodules.sources.editing.countries import Countries
    from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
    from malleable.lightning_modules.editing.layout import find_layout
    from malleable.lightning_modules.editing.prompts import PromptEncoder
    from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments
    from malleable.lightning_modules.editing.targets import Fact, TargetSettings, find_targets

    shape = TINY if options.tiny else BILLION
    setting = decoding.Setting("edits", 1, num_prompts=1, batch_size=1, num_items=20, **shape, device=options.device, dtype=options.dtype)
    model, _, _ = decoding.prepare(setting, None)
    source = Countries(limit=4 if options.tiny else 100).load()
    tokenizer = byte_pairs([request.prompt.replace("{}", request.subject) for request in source.requests] + list(source.statements))
    layout, layers = find_layout(model), [1] if options.tiny else [4, 5, 6, 7, 8]
    texts = [" ".join(source.statements[start : start + 20]) for start in range(0, 40 if options.tiny else 2_000, 20)]
    facts = [Fact.from_request(request) for request in source.requests]
    encoder, settings = PromptEncoder(tokenizer), TargetSettings(lr=0.5, steps=2 if options.tiny else 25)

    def seconds(function: Callable[[], Any]) -> float:
        synchronize(options.device)
        start = time.perf_counter()
        function()
        synchronize(options.device)
        return time.perf_counter() - start

    statistics = seconds(lambda: second_moments(model, layout, layers, tokenizer, texts, StatisticsSettings(max_length=256)))
    with evaluation_mode(model):
        contexts = ["{}", "It is said that {}"]
        together = seconds(lambda: find_targets(model, layout, layers[-1], encoder, facts, contexts, settings))
        block = layout.block_of(model, layers[-1])
        literal = seconds(lambda: [program.literal_target(model, block, encoder, fact, contexts, settings) for fact in facts[:2]])
    each = literal / 2
    return {"statistics_s": statistics, "targets_s": together, "literal_fact_s": each, "ratio": each * len(facts) / together}


def byte_pairs(texts: list[str]) -> Any:
    """Train a small BPE tokenizer on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


PARTS: dict[str, tuple[int, Part]] = {
    "preference-16": (60, partial(preference, batch_size=16)),
    "preference-64": (80, partial(preference, batch_size=64)),
    "decoding-135m": (50, partial(decode, shape=SMALL)),
    "decoding-1b": (70, partial(decode, shape=BILLION)),
    "sprec": (60, sprec),
    "nfe": (40, partial(graph, models=["NFE-1"])),
    "kg-epoch": (40, partial(graph, models=["ComplEx"])),
    "alpha-edit": (60, alpha_edit),
}
"""Time budget in seconds and function of each part, by name. The sum of the budgets is 460 s."""


@contextlib.contextmanager
def budget(seconds: int) -> Iterator[None]:
    """Raise :class:`TimeoutError` in the ``with`` block after the given number of seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"the part exceeded its time budget of {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part within its budget, and print its figures."""
    seconds, part = PARTS[name]
    log.info("%s (at most %s s; %s)", name, seconds, describe(options.device))
    start = time.perf_counter()
    try:
        seed_everything(0, verbose=False)
        with budget(10 * seconds if options.tiny else seconds):
            figures = part(options)
    except ModuleNotFoundError as error:
        figures = {"error": f"{error}; install the packages of the comparisons: pip install -e '.[bench]'"}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"}
    for key, value in figures.items():
        if key.startswith("ratio"):
            log.info("  %s: %.2f", key.replace("ratio", "ratio:", 1) if key != "ratio" else "ratio", value)
        elif key != "figures":
            log.info("  %s: %s", key, f"{value:.4g}" if isinstance(value, float) else value)
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return {**figures, "seconds": time.perf_counter() - start}


def main() -> None:
    """Run the parts. The exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--list", action="store_true", help="print the names and time budgets of the parts")
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="data type of the weights; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check on a CPU that every part runs")
    parser.add_argument("--movielens", type=Path, help="folder of MovieLens-100K")
    parser.add_argument("--fb15k237", type=Path, help="folder of FB15k-237")
    parser.add_argument("--json", type=Path, help="output file for all figures")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("gpu_suite", "preference_step", "decoding", "benchmark"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.list:
        log.info("\n".join(f"{name}: {seconds} s" for name, (seconds, _) in PARTS.items()))
        return
    results = {name: run(name, options) for name in options.parts}
    if options.json:
        options.json.write_text(json.dumps({"device": describe(options.device), "parts": results}, indent=1, default=str), encoding="utf-8")
    if failed := [name for name, figures in results.items() if "error" in figures]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
