"""Modules of earlier runs: found by name, loaded frozen, and aligned by title."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_shop import shop
from tiny import batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, save_base

from malleable.datamodules.batch import Catalog
from malleable.lightning_modules.base import BaseModule
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.dpo import DPO
from malleable.lightning_modules.recommendation.sft import SFT
from malleable.lightning_modules.trained import find_trained, item_positions, load_trained


def run(folder, config=None, epochs=2):
    """Train an SFT model as a run in a folder; return the module as tested."""
    module = SFT(language_model=config or tiny_config(), ks=(1, 3), tuning=Tuning(lr=1e-2, warmup_steps=0))
    best = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", monitor="val_loss", save_last=True, save_top_k=1)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[best])
    trainer.fit(module, TinyData())
    return module.eval(), best.best_model_path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of a recipe below the working directory."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "runs/sft/tiny/version_0", epochs=1)
    return run(tmp_path / "runs/sft/tiny/version_3")


@pytest.mark.parametrize("name", ["last:sft/tiny", "last:sft/tiny.yaml", "last:runs/sft/tiny", "runs/sft/tiny/version_3"])
def test_the_latest_run_of_a_recipe_with_its_best_weights(runs, name):
    _, best = runs
    assert find_trained(name).resolve().samefile(best)
    loaded = load_trained(name, SFT)
    stored = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in stored.items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_checkpoint_file_gives_the_same_recommendations(runs):
    _, best = runs
    loaded = load_trained(best, BaseModule if torch.load(best, weights_only=True)["hyper_parameters"].get("_class_path") else SFT)
    batch = batch_of(tiny_rows(6))
    expected = load_trained("last:sft/tiny", SFT).recommend(batch, 8)
    assert torch.equal(loaded.recommend(batch, 8).scores, expected.scores)
    assert loaded.catalog == tiny_catalog()


def test_missing_runs_and_checkpoints_are_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="last:sft/none: there is no run with a checkpoint in runs/sft/none or sft/none"):
        load_trained("last:sft/none", SFT)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint x.ckpt; give a checkpoint file, a run folder, or last:<recipe>"):
        find_trained("x.ckpt")
    (tmp_path / "sharded.ckpt/checkpoint").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"sharded.ckpt is a folder that a sharded strategy has written"):
        find_trained("sharded.ckpt")


def rename(path, class_path):
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_class_path"] = class_path
    torch.save(content, path)


@pytest.mark.parametrize(
    ("class_path", "kind", "message"),
    [
        ("malleable.lightning_modules.recommendation.sft.SFT", DPO, "is a SFT, expected a DPO"),
        ("somewhere.Model", LanguageModel, "is of the class somewhere.Model, which is not part of malleable; importing it could run code"),
        ("malleable.lightning_modules.gone.Gone", LanguageModel, "which does not exist in this version of malleable"),
    ],
)
def test_classes_are_checked(runs, class_path, kind, message):
    rename(runs[1], class_path)
    with pytest.raises(ValueError, match=message):
        load_trained(runs[1], kind)


def test_a_base_class_accepts_its_subclasses(runs):
    rename(runs[1], "malleable.lightning_modules.recommendation.sft.SFT")
    assert type(load_trained("last:sft/tiny", LanguageModel)) is SFT


def test_items_are_aligned_by_title(tmp_path):
    earlier = Catalog(("Brazil", "Alien", "Dune"), keys=("1", "2", "3"))
    now = Catalog(("Alien", "Casablanca", "Dune"), keys=("1", "2", "3"))
    assert item_positions(now, earlier).tolist() == [1, -1, 2]
    assert item_positions(now, earlier, needed=[0, 2]).tolist() == [1, -1, 2]
    with pytest.raises(ValueError, match="the titles of 1 items are not in the catalogue of 3 items of the earlier run: 'Casablanca'"):
        item_positions(now, earlier, needed=[1])
    with pytest.raises(ValueError, match="the titles of 3 items are not in the catalogue"):
        item_positions(replace(now, titles=("X", "Y", "Z")), earlier)


def test_another_filter_and_another_order_give_the_same_items(tmp_path):
    def catalog(folder, **options):
        data = shop(tmp_path / folder, **options)
        data.prepare_data()
        data.setup("fit")
        return data.catalog

    from small_shop import TITLES

    whole = catalog("whole")
    other = catalog("other", items={key: title for key, title in reversed(TITLES.items()) if key != "f1"})
    positions = item_positions(other, whole)
    assert [whole.titles[place] for place in positions.tolist()] == list(other.titles)


# --- the second of two stages ---


def test_weights_of_an_earlier_run_are_the_base_of_the_next(runs, tmp_path):
    module, _ = runs
    module.export(tmp_path / "runs/sft/tiny/version_3")
    config = LanguageModelConfig(name="last:sft/tiny")
    assert config.name == "runs/sft/tiny/version_3/model"
    stage = DPO(language_model=config, catalog=tiny_catalog())
    stage.configure_model()
    assert all(torch.equal(value, module.model.state_dict()[name]) for name, value in stage.model.state_dict().items())
    assert stage.hparams["language_model"]["name"] == "runs/sft/tiny/version_3/model"


def test_an_adapter_and_its_base_have_separate_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, _ = run(tmp_path / "runs/sft/lora/version_0", lora(save_base(tmp_path / "base")))
    with pytest.raises(FileNotFoundError, match="which has no folder model or adapter, because the run is not finished"):
        LanguageModelConfig(name="last:sft/lora")
    module.export(tmp_path / "runs/sft/lora/version_0")
    assert LanguageModelConfig(name="base", adapter="last:sft/lora").adapter == "runs/sft/lora/version_0/adapter"
    with pytest.raises(ValueError, match="name=last:sft/lora is the folder runs/sft/lora/version_0/adapter, but must be a folder named model; give"):
        LanguageModelConfig(name="last:sft/lora")


def test_the_tokenizer_of_an_earlier_run(runs, tmp_path):
    module, _ = runs
    module.export(tmp_path / "runs/sft/tiny/version_3")
    assert shop(tmp_path / "shop", tokenizer="last:sft/tiny").tokenizer == "runs/sft/tiny/version_3/model"
