"""Every recipe is read against the real signatures; every tiny one runs."""

import contextlib
import io
import json
import shlex
import warnings
from types import SimpleNamespace

import pytest
import yaml

from malleable import LastCheckpoint
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.precision import check_training_precision
from malleable.lightning_modules.serialization import from_plain
from malleable.main import main
from malleable.recipes import FOLDER, recipe_names
from malleable.unused import check_unused

FRAGMENTS = sorted(path.relative_to(FOLDER).as_posix() for path in (FOLDER / "base").glob("*.yaml"))
RECIPES = recipe_names()
MONITORED = [name for name in RECIPES if "monitor" in (yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")).get("checkpoint") or {})]
TINY = [name for name in RECIPES if name.endswith("/tiny.yaml")]


def printed(command, *words):
    """Return the configuration that a command line comes to."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([command, *words, "--print_config"])
    assert ended.value.code == 0, err.getvalue()
    return out.getvalue()


def test_there_are_recipes():
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    assert found == {*RECIPES, *FRAGMENTS}
    assert {"sprec/movielens.yaml", "sprec/tiny.yaml"} <= set(RECIPES)
    assert {"base/fit.yaml", "base/ddp.yaml", "base/deepspeed_zero2.yaml", "base/deepspeed_zero3.yaml"} <= set(FRAGMENTS)


@pytest.mark.parametrize("name", [*RECIPES, *FRAGMENTS])
def test_the_first_line_says_what_it_is(name):
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_and_appends_its_callbacks(name):
    recipe = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert {"model", "data", "trainer"} <= recipe.keys()
    assert "callbacks" not in recipe["trainer"], "a recipe appends: `callbacks+:`"


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_lies_over_any_recipe(name):
    fragment = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert fragment.keys() <= ({"seed_everything", "checkpoint", "trainer"} if name == "base/fit.yaml" else {"trainer"})
    layered = yaml.safe_load(printed("fit", "--config", TINY[0], "--config", name))
    for key, value in fragment["trainer"].items():
        if not isinstance(value, dict):
            assert layered["trainer"][key] == value
        elif "class_path" in value:
            assert layered["trainer"][key]["class_path"].endswith(value["class_path"])
            assert layered["trainer"][key]["init_args"].items() >= value.get("init_args", {}).items()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_signatures_and_survives_being_saved(name, tmp_path, caplog):
    first = printed("fit", "--config", name)
    check_unused(["fit", "--config", name], yaml.safe_load(first))
    assert "has no effect" not in caplog.text
    (tmp_path / "saved.yaml").write_text(first)
    assert yaml.safe_load(printed("fit", "--config", "saved.yaml")) == yaml.safe_load(first)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_the_same_steps_on_any_number_of_devices(name):
    recipe = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert recipe["model"].get("init_args", {}).get("frozen") or recipe["data"]["init_args"].get("global_batch_size")


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("baselines", "nfe", "sequential"))])
def test_a_recipe_trains_in_a_precision_that_loses_nothing(name):
    """Neither refused nor warned about: weights that train are float32, and so is everything that is edited."""
    recipe = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    settings = recipe["model"]["init_args"]
    if str(settings["language_model"].get("name")).startswith("last:"):
        settings["language_model"]["name"] = "gpt2"  # there is no earlier run
    precision = recipe["trainer"].get("precision", "32-true")
    config = from_plain(LanguageModelConfig, settings["language_model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_training_precision(SimpleNamespace(precision=precision, strategy=None), config)
    if name.startswith("alpha_edit"):
        assert (precision, config.dtype) == ("32-true", "float32")


def test_the_published_recipe_of_self_play_makes_the_released_steps():
    """Supervised steps of 16 rows and preference steps of 8, adapters in float32 on 4-bit weights."""
    recipe = yaml.safe_load((FOLDER / "sprec/goodreads_llama.yaml").read_text(encoding="utf-8"))
    loop = recipe["trainer"]["callbacks+"][0]["init_args"]
    rows = recipe["data"]["init_args"]["global_batch_size"]
    assert {kind: rows * loop[kind].get("batch_factor", 1) for kind in ("warmup", "sft", "dpo")} == {"warmup": 16, "sft": 16, "dpo": 8}
    assert recipe["trainer"]["precision"] == "bf16-mixed"
    assert recipe["model"]["init_args"]["language_model"]["quantization"] == "4bit"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_serves_every_command(name, command):
    printed(command, "--config", name)


@pytest.mark.parametrize("name", MONITORED)
def test_a_monitored_recipe_saves_the_last_epoch_after_every_epoch(name, monkeypatch):
    from malleable.cli import MalleableCLI, run

    monkeypatch.setattr(MalleableCLI, "_run_subcommand", lambda *_: None)
    words = ["fit", "--config", name, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
    trainer = run(words).trainer
    (last,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint))
    assert (last._every_n_epochs, last._save_on_train_epoch_end, last.monitor) == (1, True, None)


@pytest.mark.slow
def test_the_words_in_the_heads_of_recipes_are_understood():
    lines = [(name, line[1:]) for name in RECIPES for line in (FOLDER / name).read_text(encoding="utf-8").splitlines() if line.startswith("#   --")]
    # Six published models beside the recipe's own on three graphs, two flows on two small ones, three ways to edit, four sequence encoders.
    assert len(lines) == 29
    for name, words in lines:
        assert printed("fit", "--config", name, *shlex.split(words)) != printed("fit", "--config", name)


QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
# Facts take minutes to learn: here the way is tried, not what is at its end.
SMALLER = {
    "alpha_edit/tiny.yaml": [
        *("--model.language_model.scratch.num_layers", "2", "--model.language_model.scratch.intermediate_size", "128", "--trainer.max_epochs", "1"),
        *("--data.shuffles", "1", "--data.source.init_args.limit", "6", "--data.source.init_args.relations", '["continent"]'),
        *("--trainer.callbacks.EditEvaluation.protocol.writing", "20", "--trainer.callbacks.settings.layers", "[0]"),
    ],
    "dpo/tiny.yaml": ["--data.source.num_users", "40", "--trainer.check_val_every_n_epoch", "5"],
    "sft/tiny.yaml": ["--data.source.num_users", "40", "--trainer.check_val_every_n_epoch", "5"],
    "sprec/tiny.yaml": ["--data.source.num_users", "24", "--trainer.check_val_every_n_epoch", "10"],
}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_trains_and_is_measured(name, tmp_path):
    quiet = ["--config", name, *QUIET, *SMALLER.get(name, [])]
    main(["fit", *quiet])
    main(["test", *quiet, "--ckpt_path", "last"])
    runs = tmp_path / "runs" / name.removesuffix(".yaml")
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "a run writes into its own folder only"


@pytest.mark.slow(minutes=8)
def test_two_hundred_edits_hold_at_the_end(tmp_path):
    main(["fit", "--config", "alpha_edit/tiny.yaml", *QUIET, "--trainer.callbacks.EditEvaluation.protocol.survival", "false"])
    report = tmp_path / "runs/alpha_edit/tiny/version_0/report"
    figures = json.loads((report / "metrics.json").read_text())
    assert figures["before_efficacy"] <= 5
    assert figures["before_specificity_exact"] >= 95
    assert figures["test_efficacy"] >= 95
    assert (report / "second_moments_of_keys.png").is_file()
