import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Trainer
from toy_shop import TITLES, ToyShop

from malleable.callbacks.report.exposure import ExposureReport
from malleable.callbacks.report.report import RunReport
from malleable.lightning_modules.recommendation.baselines import Popularity


def trainer(tmp_path, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet)


def test_counts_are_those_of_the_recommended_lists(tmp_path):
    exposure = ExposureReport(k=2)
    module, data = Popularity(ks=(2, 3)), ToyShop()
    runner = trainer(tmp_path, RunReport(), exposure)
    runner.test(module, data, verbose=False)
    lists = torch.cat([items for items, _ in runner.predict(module, data)])[:, :2]
    assert exposure.recommended.tolist() == torch.bincount(lists.flatten(), minlength=len(TITLES)).tolist()
    page = (tmp_path / "report" / "report.md").read_text()
    distinct = len(lists.unique())
    assert f"{distinct} of 8 titles are recommended at least once." in page
    assert "| title | recommended | share | share of training interactions |" in page
    assert (tmp_path / "report" / "most_recommended_titles.png").is_file()
    assert (tmp_path / "report" / "concentration_of_exposure.png").is_file()


def test_unknown_popularity_is_omitted(tmp_path):
    exposure = ExposureReport()
    trainer(tmp_path, exposure).test(Popularity(ks=(3,)), ToyShop(popularity=False), verbose=False)
    assert exposure.recommended.sum() == 3 * 12
    assert exposure.report_sections()[0].table[0] == ["title", "recommended", "share"]


def test_other_modules_have_no_section(tmp_path):
    exposure = ExposureReport()
    trainer(tmp_path, exposure).test(BoringModule(), BoringDataModule(), verbose=False)
    assert exposure.report_sections() == []


def test_refusal():
    with pytest.raises(ValueError, match="k must be >= 1 or null, got 0"):
        ExposureReport(k=0)
