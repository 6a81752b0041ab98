"""A checkpoint on the command line brings the settings, the tokenizer, the template and the catalogue of its weights."""

import json
import logging
import os

import pytest
import small_shop
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false", "--trainer.callbacks", "[]"]
QUIET += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
RECIPE = {
    "model": {
        "class_path": "SFT",
        "init_args": {
            "language_model": {"lora": None, "scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 128}},
            "tuning": {"lr": 1e-2, "warmup_steps": 0},
            "decoding": {"num_beams": 3},
            "ks": [1, 3],
        },
    },
    "data": {
        "class_path": "RecommendationDataModule",
        "init_args": {
            "source": {"class_path": "malleable.datamodules.sources.recommendation.tables.Tables", "init_args": {"interactions": "", "items": ""}},
            "vocab_size": 300,
            "template": "history",
            "split": {"history_length": 3},
        },
    },
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with the recipe and a checkpoint of it, whose model has options of the command line; and its test figures."""
    from malleable.cli import run

    folder = tmp_path_factory.mktemp("shop")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("MALLEABLE_CACHE", str(folder / "cache"))
    (folder / "shop.yaml").write_text(yaml.safe_dump(RECIPE))

    def command(name, variant="shop", *words):
        source = getattr(small_shop, variant)(folder / variant).source
        files = ["--data.source.interactions", source.interactions, "--data.source.items", source.items]
        os.chdir(folder)  # every test has a working directory of its own, which it leaves afterwards
        return run([name, "--config", "shop.yaml", *QUIET, *map(str, files), *map(str, words)])

    options = ["--model.language_model.scratch.num_heads", 4, "--model.language_model.lora", '{"r": 2, "alpha": 8, "dropout": 0.0}']
    options += ["--data.template.suffix", "=>", "--data.template.separator", "|", "--trainer.max_epochs", 1]
    cli = command("fit", "shop", *options)
    cli.trainer.save_checkpoint("saved.ckpt")
    (figures,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    yield command, figures
    patch.undo()


def figures(cli):
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def test_settings_of_the_checkpoint_override_the_recipe(shop, caplog):
    """The recipe says two heads, no adapters and another template."""
    command, expected = shop
    caplog.set_level(logging.INFO, logger="malleable")
    assert figures(command("test", "shop", "--ckpt_path", "saved.ckpt")) == pytest.approx(expected, abs=1e-5)
    (line,) = [message for message in caplog.messages if "override those of the recipe" in message]
    assert "language_model.scratch.num_heads 4 (recipe: 2)" in line
    assert "language_model.lora {" in line
    assert "tokenizer, template and catalogue are read from saved.ckpt" in caplog.text


@pytest.mark.parametrize("variant", ["reordered", "more_users"])
def test_new_tables_are_read_under_the_stored_tokenizer_and_catalogue(shop, variant):
    command, expected = shop
    cli = command("test", variant, "--ckpt_path", "saved.ckpt")
    stored = torch.load("saved.ckpt", weights_only=True)["catalog"]
    assert list(cli.model.catalog.titles) == stored["titles"]
    assert [list(row) for row in cli.model.catalog.token_ids] == [list(row) for row in stored["token_ids"]]
    if variant == "reordered":
        assert figures(cli) == pytest.approx(expected, abs=1e-5)


def test_resumed_run_keeps_its_settings_with_more_users(shop):
    command, _ = shop
    cli = command("fit", "more_users", "--ckpt_path", "saved.ckpt", "--trainer.max_epochs", 2)
    assert cli.model.language_model.scratch.num_heads == 4
    assert cli.model.language_model.lora.alpha == 8
    assert cli.trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--model.language_model.scratch.num_heads",
            8,
            r"--model.language_model.scratch.num_heads is 8, but .* trained with 4; omit the option",
        ),
        ("--model.language_model.lora.alpha", 16, "--model.language_model.lora.*16.*, but .* trained with .*8"),
        ("--model.language_model.lora", '{"r": 2, "alpha": 32}', "--model.language_model.lora.* is 32, but .* trained with 8"),
        ("--data.template", "instruction", "template is .*enjoyed.* here, but .*=>.* in saved.ckpt"),
        ("--data.tokenizer", "small", r"trained on other data: .*tokenizer \w{12} in the checkpoint, \w{12} here"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint_is_refused(shop, tmp_path, option, value, message):
    from malleable.datamodules.language.tokenizer import train_tokenizer

    command, _ = shop
    value = train_tokenizer(["other", "titles"], 300) if value == "small" else value
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        command("test", "shop", "--ckpt_path", "saved.ckpt", option, value)


def test_options_that_agree_or_concern_the_data_are_accepted(shop):
    command, _ = shop
    words = ["--model.language_model.scratch.num_heads", 4, "--data.batch_size", 3, "--model.decoding.num_beams", 5]
    cli = command("test", "shop", "--ckpt_path", "saved.ckpt", *words)
    assert (cli.datamodule.batch_size, cli.model.decoding.num_beams) == (3, 5)


def test_new_items_are_reported_and_added_with_extend_catalog(shop, caplog):
    command, _ = shop
    with pytest.raises(ValueError, match=r"2 items of the data are not in the catalogue of 12 .*'A Quiet Mirror' \(id n1\).*--extend_catalog"):
        command("test", "more_items", "--ckpt_path", "saved.ckpt")
    for _ in range(2):  # the second time, the prepared data are in the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            cli = command("test", "more_items", "--ckpt_path", "saved.ckpt", "--extend_catalog")
        assert cli.model.catalog.titles[12:] == ("A Quiet Mirror", "A Quiet Harbor")
        assert [message for message in caplog.messages if "extend_catalog" in message] == [
            "extend_catalog: 2 new items after the 12 items of the checkpoint: 'A Quiet Mirror', 'A Quiet Harbor'; no weights are added: the model "
            "scores the tokens of their titles, on which it was not trained"
        ]
    with pytest.raises(MisconfigurationException, match="--extend_catalog adds items to the catalogue of a checkpoint; add --ckpt_path"):
        command("fit", "more_items", "--extend_catalog")


@pytest.mark.slow
def test_predictions_of_a_checkpoint(shop, tmp_path):
    (tmp_path / "histories.jsonl").write_text(json.dumps({"history": [{"id": "f3"}, {"id": "f4"}]}))
    command, _ = shop
    first, other = (
        command("predict", variant, "--ckpt_path", "saved.ckpt", "--data.predict_file", tmp_path / "histories.jsonl")
        for variant in ("shop", "reordered")
    )
    batches = [cli.trainer.predict(cli.model, cli.datamodule) for cli in (first, other)]
    assert torch.equal(batches[0][0].item_ids, batches[1][0].item_ids)
