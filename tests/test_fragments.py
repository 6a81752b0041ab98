"""The fragments of `configs/base` are run over every tiny recipe: two ranks give the figures of one process, or the run is refused by name."""

import json
import math
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml
from commands_run import cpu_strategy, run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from malleable.main import main
from malleable.recipes import FOLDER, recipe_names

# Self-play on two ranks is in callbacks/test_sharded.py, with its rounds and negatives.
RECIPES = [*(name for name in recipe_names() if name.endswith("/tiny.yaml") and not name.startswith("sprec/")), "baselines/movielens.yaml"]
FRAGMENTS = sorted(path.stem for path in (FOLDER / "base").glob("*.yaml") if path.stem not in ("fit", "debug"))
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHOP = ["--data.source", "Synthetic", "--data.source.num_users", "41"]
# An uneven number of rows to test on, and a few steps. Recipes that are not listed run as they are.
SMALLER = {
    # With few steps, rounding errors do not change a sampled token.
    "alpha_dpo/tiny.yaml": ["--data.source.num_rows", "240", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"],
    "alpha_edit/tiny.yaml": [
        *("--model.language_model.scratch.num_layers", "2", "--model.language_model.scratch.intermediate_size", "128", "--trainer.max_epochs", "1"),
        *("--data.shuffles", "1", "--data.source.init_args.limit", "5", "--data.source.init_args.relations", '["continent"]'),
        *("--trainer.callbacks.EditEvaluation.protocol.writing", "20", "--trainer.callbacks.settings.layers", "[0]"),
    ],
    "baselines/movielens.yaml": [*SHOP, "--data.split", "null", "--data.batch_size", "16", "--data.global_batch_size", "16"],
    "dpo/tiny.yaml": SHOP,
    "nfe/tiny.yaml": ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1"],
    "sequential/tiny.yaml": ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1"],
    "sft/tiny.yaml": [*SHOP, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1"],
}
# Recipes with other settings, by recipe and name.
VARIANTS = {
    "nfe/tiny.yaml, trainable margin": ["--model.gamma_trainable", "true"],
    "sft/tiny.yaml, compiled": ["--model.language_model.compile.backend", "aot_eager"],
    "sft/tiny.yaml, adapter": ["--model.language_model.lora", "{r: 2, dropout: 0.0}"],
}
REFUSED = {
    ("baselines/movielens.yaml", "deepspeed_zero2"): "ItemKNN has no weights that can be sharded: it cannot run `fit` with CPUDeepSpeedStrategy",
    ("baselines/movielens.yaml", "deepspeed_zero3"): "ItemKNN has no weights that can be sharded: it cannot run `fit` with CPUDeepSpeedStrategy",
    ("baselines/movielens.yaml", "fsdp2"): "ItemKNN cannot run with FSDP2Strategy: it does not shard its weights over ranks",
    ("nfe/tiny.yaml", "deepspeed_zero3"): "NFE cannot run with ZeRO stage 3: it partitions the tables, which every step reads whole",
    ("nfe/tiny.yaml, trainable margin", "deepspeed_zero3"): "NFE cannot run with ZeRO stage 3: it partitions the tables",
    ("nfe/tiny.yaml", "fsdp2"): "NFE cannot run with FSDP2Strategy: it does not shard its weights over ranks",
    ("nfe/tiny.yaml, trainable margin", "fsdp2"): "NFE cannot run with FSDP2Strategy: it does not shard its weights over ranks",
    ("sequential/tiny.yaml", "deepspeed_zero3"): "SequentialRecommender cannot run with ZeRO stage 3: it partitions the table of embeddings",
    ("sequential/tiny.yaml", "fsdp2"): "SequentialRecommender cannot run with FSDP2Strategy: it does not shard its weights over ranks",
    ("sft/tiny.yaml, compiled", "fsdp2"): "language_model.compile does not support weights that are sharded over ranks",
    ("alpha_edit/tiny.yaml", "fsdp2"): "cannot run `fit` with FSDP2Strategy: it needs whole weights",
    ("sft/tiny.yaml, compiled", "deepspeed_zero3"): "language_model.compile does not support weights that are sharded over ranks",
    ("alpha_edit/tiny.yaml", "deepspeed_zero2"): "cannot run `fit` with CPUDeepSpeedStrategy: it needs whole weights",
    ("alpha_edit/tiny.yaml", "deepspeed_zero3"): "cannot run `fit` with CPUDeepSpeedStrategy: it needs whole weights",
}


def command(what, recipe, fragment, ranks):
    name = recipe.partition(",")[0]
    over = ["--config", f"base/{fragment}.yaml"] if fragment else []
    words = [what, "--config", name, *over, *QUIET, *SMALLER.get(name, []), *VARIANTS.get(recipe, [])]
    return [*words, *(cpu_strategy(fragment) if fragment else []), "--trainer.devices", str(ranks)]


def run_folder(folder: Path, recipe: str, version: int = 0) -> Path:
    return folder / "runs" / recipe.partition(",")[0].removesuffix(".yaml") / f"version_{version}"


def figures(folder: Path, recipe: str, version: int = 0) -> dict[str, float]:
    return json.loads((run_folder(folder, recipe, version) / "report/metrics.json").read_text())


def assert_same_export(found: Path, expected: Path, recipe: str) -> None:
    """A language model or its adapter is written by the first rank alone, whole, as one process writes it."""
    for name in ("model", "adapter"):
        ours, theirs = (run_folder(folder, recipe) / name for folder in (found, expected))
        assert ours.exists() == theirs.exists()
        if not theirs.exists():
            continue
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        state, other = (weights(folder) for folder in (ours, theirs))
        assert state.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(state[key], value, atol=1e-4, rtol=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if folder.name == "adapter":
        return load_file(folder / "adapter_model.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Run a recipe under each fragment on two ranks, once; return the folder and the errors."""
    done = {}

    def run(recipe):
        if recipe not in done:
            folder = tmp_path_factory.mktemp("ranks")
            done[recipe] = folder, run_on_ranks(folder, {fragment: [command("fit", recipe, fragment, 2)] for fragment in FRAGMENTS}, timeout_s=600)
        return done[recipe]

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run a recipe in this process, once; return the folder."""
    done = {}

    def run(recipe):
        if recipe not in done:
            done[recipe] = tmp_path_factory.mktemp("alone")
            with chdir(done[recipe]):
                main(command("fit", recipe, "", 1))
        return done[recipe]

    return run


@pytest.mark.slow(minutes=1)
@pytest.mark.ddp
@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANTS])
def test_two_ranks_give_the_figures_of_one(on_two_ranks, alone, recipe, fragment):
    """Fit, validation and test; no tiny recipe has dropout, which would differ from rank to rank."""
    folder, errors = on_two_ranks(recipe)
    if (recipe, fragment) in REFUSED:
        assert all(REFUSED[recipe, fragment] in error for error in errors[fragment]), errors[fragment]
        assert not list((folder / fragment).rglob("checkpoints")), "refused before anything long begins"
        return
    assert errors[fragment] == ["", ""]
    if fragment.startswith("deepspeed"):
        config = yaml.safe_load((run_folder(folder / fragment, recipe) / "config_fit.yaml").read_text())
        assert config["trainer"]["strategy"]["init_args"]["stage"] == int(fragment[-1])
    expected, found = figures(alone(recipe), recipe), figures(folder / fragment, recipe)
    assert any(name.startswith("test_") for name in expected)
    assert all(value is not None and math.isfinite(value) for value in expected.values()), expected
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-5)  # float32 rounds a perplexity of 250 by more than 1e-4
    assert_same_export(folder / fragment, alone(recipe), recipe)
    versions = list(run_folder(folder / fragment, recipe).parent.iterdir())
    assert [path.name for path in versions] == ["version_0"], "all ranks write into one folder"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_debugging_runs_a_few_batches(tmp_path, recipe):
    main(command("fit", recipe, "debug", 1))
    assert any(name.startswith("test_") for name in figures(tmp_path, recipe))
