import json

import pytest
from boring import BoringDataModule, BoringModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from toy_shop import ToyShop

from malleable.callbacks.report.floors import Floors
from malleable.callbacks.report.report import RunReport
from malleable.lightning_modules.recommendation.baselines import Baseline, ItemKNN, Markov, Popularity


def trainer(tmp_path, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet)


def test_floors_are_what_each_baseline_measures_itself(tmp_path):
    floors = Floors()
    trainer(tmp_path, RunReport(), floors).test(Popularity(ks=(1, 3)), ToyShop(), verbose=False)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    for name, kind in (("popularity", Popularity), ("item_knn", ItemKNN), ("markov", Markov)):
        alone = trainer(tmp_path).test(kind(ks=(1, 3)), ToyShop(), verbose=False)[0]
        own = {key.replace("test_", f"floor_{name}_"): value for key, value in alone.items()}
        assert own == pytest.approx({key: metrics[key] for key in own})
    assert metrics["floor_popularity_hr_3"] == metrics["test_hr_3"]
    assert "| metric | Popularity | 95 % interval | Popularity | ItemKNN | Markov |" in (tmp_path / "report" / "report.md").read_text()


def test_floors_are_what_a_fit_of_each_baseline_gives(tmp_path):
    """Also where the last training rows fill no batch."""
    module, data = Markov(ks=(1, 3)), ToyShop(batch_size=5)
    floors = Floors(baselines=("markov",))
    runner = trainer(tmp_path, floors)
    runner.fit(module, data)
    assert len(data.train_dataset) % 5
    (found,) = runner.test(module, data, verbose=False)
    assert {f"test_{key}": value for key, value in floors.values["markov"].items()} == pytest.approx(found)


def test_rows_are_counted_once_for_many_tests(tmp_path, monkeypatch):
    counted = []
    count = Baseline.count
    monkeypatch.setattr(Baseline, "count", lambda self, *rows: (counted.append(type(self)), count(self, *rows)))
    floors, data = Floors(baselines=("popularity",)), ToyShop()
    data.setup = lambda stage, once=data.setup: None if data.train_dataset else once(stage)
    runner = trainer(tmp_path, floors)
    runner.test(Markov(), data, verbose=False)
    first = floors.values
    assert counted.count(Popularity) == 1
    runner.test(Markov(), data, verbose=False)
    assert counted.count(Popularity) == 1
    assert floors.values == first
    assert [column.key for column in floors.report_columns()] == ["floor_popularity"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"baselines must be among \['item_knn', 'markov', 'popularity'\], got \['random'\]"):
        Floors(baselines=("random",))
    with pytest.raises(MisconfigurationException, match=r"with a `catalog`, got BoringDataModule; pass `datamodule=...` or leave Floors out"):
        trainer(tmp_path, Floors()).test(BoringModule(), BoringDataModule(), verbose=False)


def test_rows_of_another_kind_are_refused(tmp_path):
    class Odd(ToyShop):
        def setup(self, stage):
            super().setup(stage)
            boring = BoringDataModule()
            boring.setup(stage)
            self.test_dataset, self.collate_test = boring.test_dataset, boring.collate

        def collate(self, rows):
            return self.collate_test(rows) if isinstance(rows[0], tuple) else super().collate(rows)

    with pytest.raises(MisconfigurationException, match="Floors needs test rows with a history and a target, got BoringBatch"):
        trainer(tmp_path, Floors()).test(BoringModule(), Odd(), verbose=False)
