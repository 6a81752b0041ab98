import json

import pytest
import small_shop
import torch
from boring import BoringDataModule, BoringModule
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from toy_shop import ToyShop

from malleable.callbacks.report.baselines import Baselines, _snake_case
from malleable.callbacks.report.report import RunReport
from malleable.datamodules.recommendation.splits import Split
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.baselines import Baseline, ItemKNN, Markov, Popularity
from malleable.lightning_modules.recommendation.sequence_settings import EncoderSettings
from malleable.lightning_modules.recommendation.sequential import SequentialRecommender


def trainer(tmp_path, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet)


def test_values_equal_a_test_of_each_baseline(tmp_path):
    callback = Baselines()
    trainer(tmp_path, RunReport(), callback).test(Popularity(ks=(1, 3)), ToyShop(), verbose=False)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    for name, kind in (("popularity", Popularity), ("item_knn", ItemKNN), ("markov", Markov)):
        alone = trainer(tmp_path).test(kind(ks=(1, 3)), ToyShop(), verbose=False)[0]
        own = {key.replace("test_", f"baseline_{name}_"): value for key, value in alone.items()}
        assert own == pytest.approx({key: metrics[key] for key in own})
    assert metrics["baseline_popularity_hr_3"] == metrics["test_hr_3"]
    assert "| metric | Popularity | 95 % interval | Popularity | ItemKNN | Markov | EASE |" in (tmp_path / "report" / "report.md").read_text()


def test_values_equal_a_fit_of_each_baseline(tmp_path):
    """Also where the last training rows fill no batch."""
    module, data = Markov(ks=(1, 3)), ToyShop(batch_size=5)
    callback = Baselines([Markov()])
    runner = trainer(tmp_path, callback)
    runner.fit(module, data)
    assert len(data.train_dataset) % 5
    (found,) = runner.test(module, data, verbose=False)
    assert {f"test_{key}": value for key, value in callback.values["markov"].items()} == pytest.approx(found)


def test_rows_are_counted_once_for_many_tests(tmp_path, monkeypatch):
    counted = []
    count = Baseline.count
    monkeypatch.setattr(Baseline, "count", lambda self, *rows: (counted.append(type(self)), count(self, *rows)))
    callback, data = Baselines([Popularity()]), ToyShop()
    data.setup = lambda stage, once=data.setup: None if data.train_dataset else once(stage)
    runner = trainer(tmp_path, callback)
    runner.test(Markov(), data, verbose=False)
    first = callback.values
    assert counted.count(Popularity) == 1
    runner.test(Markov(), data, verbose=False)
    assert counted.count(Popularity) == 1
    assert callback.values == first
    assert [column.key for column in callback.report_columns()] == ["baseline_popularity"]


class Recent(Baseline):
    """A baseline of one's own: the last items of the history."""

    def scores(self, batch):
        ranks = torch.arange(1, 1 + batch.history.shape[1]).expand_as(batch.history)
        return torch.zeros(len(batch), len(self.catalog)).scatter(1, batch.history.clamp_min(0), ranks.float())


def test_configured_and_custom_baselines(tmp_path):
    callback = Baselines([ItemKNN(last=1), Recent(exclude_seen=False), ItemKNN(last=3)])
    module = Popularity(ks=(1, 3))
    trainer(tmp_path, RunReport(), callback).test(module, ToyShop(), verbose=False)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    for key, last in (("item_knn", 1), ("item_knn_2", 3)):
        (alone,) = trainer(tmp_path).test(ItemKNN(last=last, ks=(1, 3)), ToyShop(), verbose=False)
        assert metrics[f"baseline_{key}_ndcg_3"] == pytest.approx(alone["test_ndcg_3"])
    assert metrics["baseline_recent_hr_3"] == 0, "the next item is never among the last ones"
    assert "| Popularity | 95 % interval | ItemKNN | Recent | ItemKNN (2) |" in (tmp_path / "report" / "report.md").read_text()
    assert all(baseline.catalog is None and not baseline.is_built for baseline in callback.baselines.values()), "copies are counted"


def test_a_catalogue_that_is_too_large_for_tables(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("malleable.lightning_modules.recommendation.baselines.MAX_TABLE_ITEMS", 2)
    callback = Baselines()
    trainer(tmp_path, callback).test(Popularity(ks=(1, 3)), ToyShop(), verbose=False)
    assert list(callback.values) == ["popularity"]
    assert [column.key for column in callback.report_columns()] == ["baseline_popularity"]
    assert "Baselines: ease, item_knn, markov are not measured, because their tables are too large" in caplog.text
    chosen = Baselines([Popularity(), ItemKNN()])
    with pytest.raises(MisconfigurationException, match="ItemKNN stores a table of items x items and supports at most 2 items"):
        trainer(tmp_path, chosen).fit(Popularity(ks=(1, 3)), ToyShop())


def test_baselines_are_neither_trained_nor_saved(tmp_path):
    callback = Baselines()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    runner = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
    data = BoringDataModule()
    data.catalog = None
    runner.fit(BoringModule(), data)
    runner.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert "Baselines" not in str(content["callbacks"])
    assert set(content["state_dict"]) == {"layer.weight", "layer.bias"}


def test_baselines_in_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    listed = ["Popularity", {"class_path": "ItemKNN", "init_args": {"last": 5}}, f"{__name__}.Recent"]
    config = parser.parse_object({"callback": {"class_path": "malleable.Baselines", "init_args": {"baselines": listed}}})
    callback = parser.instantiate_classes(config).callback
    assert [type(baseline) for baseline in callback.baselines.values()] == [Popularity, ItemKNN, Recent]
    assert callback.baselines["item_knn"].last == 5


def test_keys_are_class_names_in_snake_case():
    assert [_snake_case(name) for name in ("Popularity", "ItemKNN", "BPRModel", "Top10Items")] == [
        "popularity",
        "item_knn",
        "bpr_model",
        "top10_items",
    ]


def test_errors(tmp_path):
    with pytest.raises(TypeError, match=r"baselines must be instances of Baseline or SequentialRecommender, .* got 'popularity'"):
        Baselines(["popularity"])
    with pytest.raises(MisconfigurationException, match=r"with a `catalog`, got BoringDataModule; pass `datamodule=...` or remove Baselines"):
        trainer(tmp_path, Baselines()).test(BoringModule(), BoringDataModule(), verbose=False)


def test_rows_of_another_kind_are_refused(tmp_path):
    class Odd(ToyShop):
        def setup(self, stage):
            super().setup(stage)
            boring = BoringDataModule()
            boring.setup(stage)
            self.test_dataset, self.collate_test = boring.test_dataset, boring.collate

        def collate(self, rows):
            return self.collate_test(rows) if isinstance(rows[0], tuple) else super().collate(rows)

    with pytest.raises(MisconfigurationException, match="Baselines needs test rows with a history and a target, got BoringBatch"):
        trainer(tmp_path, Baselines()).test(BoringModule(), Odd(), verbose=False)


def shop_data(tmp_path, **options):
    split = Split(sequence_length=4, min_user_events=2)
    return small_shop.shop(tmp_path, **{"tokenizer": "none", "split": split, "cache_dir": str(tmp_path / "cache"), **options})


def test_a_sequential_recommender_is_trained_before_the_first_test(tmp_path, caplog):
    """On all training rows, without a change of the caller's generator; it learns that each user reads the items in their order."""
    sasrec = SequentialRecommender(EncoderSettings(dim=16, num_layers=1), tuning=Tuning(lr=0.02, warmup_steps=0))
    callback, data = Baselines([sasrec, Popularity()], epochs=60), shop_data(tmp_path)
    runner = trainer(tmp_path, RunReport(), callback)
    states = []
    with caplog.at_level("INFO"):
        for one in (trainer(tmp_path, Baselines([Popularity()])), runner):
            torch.manual_seed(3)
            one.test(Popularity(ks=(1, 3)), data, verbose=False)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert callback.values["sasrec"]["hr_1"] > 0.9 > callback.values["popularity"]["hr_1"]
    assert caplog.text.count("trained a SequentialRecommender (sasrec) as a baseline: 60 epochs") == 1
    first = callback.values
    runner.test(Popularity(ks=(1, 3)), data, verbose=False)
    assert callback.values == first
    assert caplog.text.count("as a baseline") == 1
    assert "| SASRec | Popularity |" in (tmp_path / "report" / "report.md").read_text()
    assert not sasrec.is_built, "a copy is trained"


def test_baselines_are_measured_on_rows_of_sequences(tmp_path):
    """With the same values as on rows of prompts."""
    values = []
    for view in ("answer", "sequence"):
        callback = Baselines()
        trainer(tmp_path, callback).test(Popularity(ks=(1, 3)), shop_data(tmp_path, train_view=view), verbose=False)
        values.append(callback.values)
    assert values[0] == values[1]
    assert list(values[0]) == ["popularity", "item_knn", "markov", "ease"]


def test_a_recommender_that_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="Baselines trains a SequentialRecommender on rows of items, which ToyShop does not have"):
        trainer(tmp_path, Baselines([SequentialRecommender()])).test(Popularity(ks=(1, 3)), ToyShop(), verbose=False)
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        Baselines(epochs=0)
