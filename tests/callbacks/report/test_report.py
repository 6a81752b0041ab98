import json
import logging

import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure

from malleable.callbacks.report.page import Column, Section
from malleable.callbacks.report.plots import split_curve
from malleable.callbacks.report.report import MAX_POINTS, RunReport, curve_panels, draw_panels


class Contributor(Callback):
    """Give a section with all parts, and a column."""

    def report_sections(self):
        return [Section("Extra | part", "Words.", (("name", "value"), [("x|y", 0.5)]), lambda figure: figure.subplots().plot([1, 2]))]

    def report_columns(self):
        return [Column("Always 2", "baseline_two", {"mean_output": 2.0, "other": float("nan")})]


def run(tmp_path, callbacks, test=True, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    settings = {"max_epochs": 2, "log_every_n_steps": 1, **quiet, **settings}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **{"max_epochs": 2, "log_every_n_steps": 1, **quiet, **settings}
    )
    module, data = BoringModule(), BoringDataModule()
    trainer.fit(module, data)
    if test:
        trainer.test(module, data, verbose=False)
    return trainer


def quiet(folder, **settings):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", default_root_dir=folder, **options, **settings)


def test_a_report_after_fit_and_test(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with caplog.at_level(logging.INFO):
        # The report stands first, so it must wait for the others.
        trainer = run(tmp_path, [RunReport(), Contributor()])
    folder = tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["extra_part.png", "metrics.json", "report.md", "training.png"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_mean_output"] == pytest.approx(trainer.callback_metrics["test_mean_output"].item())
    assert metrics["baseline_two_mean_output"] == 2
    assert metrics["baseline_two_other"] is None
    assert {"train_loss", "val_loss", "val_mean_output", "test_loss", "test_distance"} <= set(metrics)
    page = (folder / "report.md").read_text()
    assert page.startswith("# BoringModule on BoringDataModule\n\n## Test metrics")
    assert "| metric | BoringModule | Always 2 |" in page
    assert "| optimizer steps | 8 |" in page
    assert "| seed | 7 |" in page
    assert "| x&#124;y | 0.5000 |" in page
    assert "![Training](training.png)" in page
    assert "mean_output" in caplog.text
    assert f"report: {folder / 'report.md'}" in caplog.text


class Recorder(DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def test_loggers_receive_each_metric_once(tmp_path):
    logger = Recorder()
    run(tmp_path, [RunReport(str(tmp_path / "report")), Contributor()], logger=[logger])
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    names = [name for row in logger.rows for name in row if name.startswith(("test_", "baseline_"))]
    assert sorted(names) == sorted(name for name, value in metrics.items() if name.startswith(("test_", "baseline_")) and value is not None)
    (baseline,) = (row for row in logger.rows if "baseline_two_mean_output" in row)
    assert baseline == {"baseline_two_mean_output": 2.0}


def test_the_log_shows_the_main_metrics_only(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path, [RunReport(headline=("mean_output",))])
    message = [record.message for record in caplog.records if "report: " in record.message][-1]
    assert "mean_output" in message
    assert "loss" not in message
    page = (tmp_path / "report" / "report.md").read_text()
    first, _, rest = page.partition("## Training")
    assert "loss" not in first
    assert "## All test metrics" in rest
    assert "| loss |" in rest


def top_rows(page):
    """Names of the metrics in the first table of a page."""
    table = page.partition("## Test metrics")[2].partition("##")[0]
    return {line.split("|")[1].split()[0] for line in table.splitlines() if line.startswith("| ")} - {"metric", "---"}


@pytest.mark.parametrize(
    ("headline", "shown"), [(None, {"mean_output", "distance"}), (("loss",), {"loss"}), ((), {"loss", "mean_output", "distance"})]
)
def test_modules_and_callbacks_declare_the_main_metrics(tmp_path, headline, shown):
    class Module(BoringModule):
        headline_metrics = ("mean_output",)

    class Other(Contributor):
        headline_metrics = ("distance", "of another run")

    trainer = quiet(tmp_path, callbacks=[Other(), RunReport(headline=headline)])
    trainer.test(Module(), BoringDataModule(), verbose=False)
    assert top_rows((tmp_path / "report/report.md").read_text()) == shown


def test_modules_without_main_metrics_show_all(tmp_path):
    """Also a LightningModule that does not inherit from ours."""

    class Plain(LightningModule):
        def test_step(self, batch, batch_idx):
            self.log_dict({"test_hr_10": 0.5, "test_gini_10": 0.5, "test_own": 1.0}, batch_size=1)

    quiet(tmp_path, callbacks=[RunReport()]).test(Plain(), BoringDataModule(), verbose=False)
    assert top_rows((tmp_path / "report/report.md").read_text()) == {"hr_10", "gini_10", "own"}


def test_fit_alone_reports_too(tmp_path):
    run(tmp_path, [RunReport(), Contributor()], test=False)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert "val_loss" in metrics
    assert "test_loss" not in metrics
    assert "## Test metrics" not in (tmp_path / "report" / "report.md").read_text()


def test_default_and_custom_folder(tmp_path):
    trainer = run(tmp_path, [RunReport()], logger=CSVLogger(tmp_path, name="runs"))
    assert (tmp_path / "runs" / "version_0" / "report" / "report.md").is_file()
    assert trainer.log_dir == str(tmp_path / "runs" / "version_0")
    run(tmp_path, [RunReport(dirpath=str(tmp_path / "elsewhere"))])
    assert (tmp_path / "elsewhere" / "report.md").is_file()


def test_curves_continue_after_resuming(tmp_path):
    whole = RunReport()
    run(tmp_path / "whole", [whole], test=False, max_epochs=2)
    first, second = RunReport(), RunReport()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run(tmp_path / "first", [first, checkpoint], test=False, max_epochs=1, enable_checkpointing=True)
    path = checkpoint.last_model_path
    torch.load(path, weights_only=True)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[second], max_epochs=2, log_every_n_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(BoringModule(), BoringDataModule(), ckpt_path=path, weights_only=True)
    assert {name: [step for step, _ in points] for name, points in second.history.items()} == {
        name: [step for step, _ in points] for name, points in whole.history.items()
    }
    assert second.history["train_loss"][:4] == first.history["train_loss"]
    assert second.seconds > first.seconds
    own = second.seconds - torch.load(path, weights_only=True)["callbacks"]["RunReport"]["seconds"]
    assert second.facts["training time"] == f"{second.seconds:.0f} s, of which {own:.0f} s after the run was resumed"


def test_curves_are_kept_when_the_best_checkpoint_is_tested(tmp_path):
    report = RunReport()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="first", every_n_epochs=10, save_last=False, save_top_k=1)
    early = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = run(tmp_path, [report, checkpoint, early], test=False, enable_checkpointing=True)
    steps = len(report.history["train_loss"])
    trainer.test(BoringModule(), BoringDataModule(), tmp_path / "epoch=0.ckpt", verbose=False)
    assert len(report.history["train_loss"]) == steps == 8


def test_fast_dev_run_writes_nothing(tmp_path):
    run(tmp_path, [RunReport()], fast_dev_run=True)
    assert not (tmp_path / "report").exists()


def test_history_is_bounded():
    report = RunReport()
    trainer = type("Trainer", (), {"callback_metrics": {"train_loss": torch.tensor(1.0)}, "global_step": 0})()
    for step in range(3 * MAX_POINTS):
        trainer.global_step, trainer.callback_metrics = step, {"train_loss": torch.tensor(1.0)}
        report._record(trainer, validation=False)
    points = report.history["train_loss"]
    assert len(points) <= MAX_POINTS
    assert points[0][0] == 0
    assert points[-1][0] == 3 * MAX_POINTS - 1


def test_values_are_recorded_only_when_logged(tmp_path):
    """One figure is logged in the first epoch only, one in every other step."""

    class Module(BoringModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.current_epoch == 0:
                self.log("early", loss.detach())
            if batch_idx % 2:
                self.log("odd", loss.detach())
            return loss

    report = RunReport()
    trainer = quiet(tmp_path, callbacks=[report], max_epochs=2)
    trainer.fit(Module(), BoringDataModule())
    assert [step for step, _ in report.history["train_loss"]] == list(range(1, 9))
    assert [step for step, _ in report.history["early"]] == [1, 2, 3, 4]
    assert [step for step, _ in report.history["odd"]] == [2, 4, 6, 8]


def test_report_after_a_kill_at_the_last_step(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_train_epoch_end=True)
    run(tmp_path / "whole", [RunReport(), checkpoint], test=False, enable_checkpointing=True)
    resumed = quiet(tmp_path / "resumed", callbacks=[RunReport()], max_epochs=2)
    resumed.fit(BoringModule(), BoringDataModule(), ckpt_path=checkpoint.last_model_path, weights_only=True)
    whole, other = (json.loads((tmp_path / name / "report/metrics.json").read_text()) for name in ("whole", "resumed"))
    assert whole == other
    assert "| optimizer steps | 8 |" in (tmp_path / "resumed/report/report.md").read_text()


def test_a_test_does_not_report_the_figures_of_training(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_train_epoch_end=True)
    run(tmp_path / "whole", [RunReport(), checkpoint], test=False, enable_checkpointing=True)
    quiet(tmp_path / "test", callbacks=[RunReport()]).test(BoringModule(), BoringDataModule(), checkpoint.last_model_path, verbose=False)
    assert all(name.startswith("test_") for name in json.loads((tmp_path / "test/report/metrics.json").read_text()))


def test_second_test_replaces_the_metrics(tmp_path):
    class Module(BoringModule):
        def test_step(self, batch, batch_idx):
            self.log("test_once", 1.0, batch_size=1)
            return super().test_step(batch, batch_idx)

    trainer = quiet(tmp_path, callbacks=[RunReport()])
    for module, once in ((Module(), True), (BoringModule(), False)):
        trainer.test(module, BoringDataModule(), verbose=False)
        assert ("test_once" in json.loads((tmp_path / "report/metrics.json").read_text())) == once


def test_training_curves_have_gaps_between_phases(tmp_path):
    phases = [(0, "supervised"), (4, "preference"), (6, "supervised"), (8, "supervised")]
    assert split_curve(([1, 4, 5, 6, 7, 8], [0.0] * 6), phases)[0] == [1, 4, 4, 5, 6, 6, 7, 8]
    figure = Figure()
    draw_panels(figure, {"loss": {"train": ([1, 4, 5, 7], [1.0, 2.0, 3.0, 4.0])}, "hr": {"val": ([4, 8], [0.0, 1.0])}}, phases)
    for axes in figure.axes[:2]:
        assert axes.get_legend_handles_labels()[1][-1] == "preference"
        (shade,) = axes.patches
        assert shade.get_extents().width > 0
    plain = Figure()
    draw_panels(plain, {"loss": {"train": ([1, 4], [1.0, 2.0])}}, [(0, "supervised")])
    assert not plain.axes[0].patches


def test_a_curve_has_one_color_in_all_panels():
    figure = Figure()
    curve = ([1, 2], [0.0, 1.0])
    draw_panels(
        figure, {"hr": {"val @1": curve, "val @5": curve, "val @10": curve}, "coverage": {"val @5": curve, "val @10": curve}, "lr": {"lr": curve}}
    )
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert all(colors[0][name] == color for name, color in colors[1].items())
    assert len(set(colors[0].values())) == 3


def test_panels_join_splits_and_cut_offs():
    point = [(1, 0.5), (2, 0.25)]
    panels = curve_panels(
        {
            "train_loss": point,
            "val_loss": point,
            "val_hr_5": point,
            "val_hr_10": [(1, float("nan"))],
            "lr-AdamW": point,
            "train_rewards/margins": point,
            "val_once": point[:1],
            "val_both_5": point[:1],
            "val_both_10": point,
        }
    )
    assert {metric: list(curves) for metric, curves in panels.items()} == {
        "loss": ["train", "val"],
        "hr": ["val @5"],
        "lr-AdamW": ["lr-AdamW"],
        "rewards/margins": ["train"],
        "both": ["val @5", "val @10"],
    }
