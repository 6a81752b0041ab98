import re

import pytest
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Trainer

from malleable import LineProgress, LossProgressBar

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def lines(capsys, **settings):
    trainer = Trainer(callbacks=[LineProgress(settings.pop("parts", 10))], **QUIET, **settings)
    trainer.fit(BoringModule(), BoringDataModule())
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("fit")], trainer


def test_a_fit_prints_a_line_for_each_tenth(capsys):
    found, _ = lines(capsys, max_epochs=40)
    assert [int(re.match(r"fit: (\d+) %", line)[1]) for line in found] == list(range(10, 101, 10))
    assert "epoch 3 of 40" in found[0]
    assert "val_loss" in found[0]
    assert re.search(r"train_loss \d", found[0])
    assert re.search(r"\(\d+ s\)$", found[0])


def test_a_short_fit_has_no_more_lines_than_batches(capsys):
    assert len(lines(capsys, max_epochs=1)[0]) == 4


@pytest.mark.parametrize(
    ("settings", "count"), [({"max_steps": 8}, 8), ({"max_epochs": -1, "max_time": "00:00:00:01"}, None), ({"parts": 2, "max_epochs": 6}, 2)]
)
def test_other_lengths(capsys, settings, count):
    found, _ = lines(capsys, **settings)
    assert found
    if count:
        assert len(found) == count


def test_test_and_prediction_print_lines_too(capsys):
    _, trainer = lines(capsys, max_epochs=1)
    trainer.test(BoringModule(), BoringDataModule(), verbose=False)
    trainer.predict(BoringModule(), BoringDataModule(), return_predictions=False)
    out = capsys.readouterr().out
    assert [line.split(" (")[0] for line in out.splitlines() if line.startswith("test")] == ["test: 20 %", "test: 50 %", "test: 70 %", "test: 100 %"]
    assert out.count("predict: ") == 4


class Loggable(BoringModule):
    """Logs as on an accelerator: no figure is marked for progress bars."""

    def log(self, name, value, **options):
        super().log(name, value, **{**options, "prog_bar": False})


@pytest.mark.parametrize("kind", [LineProgress, LossProgressBar])
def test_the_training_loss_is_read_when_it_is_printed(kind, capsys):
    progress = kind()
    trainer = Trainer(callbacks=[progress], max_epochs=1, **QUIET)
    trainer.fit(Loggable(), BoringDataModule())
    assert "train_loss" not in trainer.progress_bar_metrics
    printed = capsys.readouterr()
    assert re.search(r"train_loss[ =]\d", printed.out + printed.err)


def test_a_bar_reads_the_loss_twice_in_a_second_at_most(monkeypatch):
    bar, now, losses = LossProgressBar(), [0.0], iter(range(100))
    monkeypatch.setattr("malleable.callbacks.line_progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("malleable.callbacks.line_progress.training_loss", lambda trainer: {"train_loss": float(next(losses))})
    trainer = Trainer(callbacks=[bar], **QUIET)
    shown = []
    for now[0] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.2):
        shown.append(bar.get_metrics(trainer, None)["train_loss"])
    assert shown == [0, 0, 0, 1, 1, 2]


def test_output_can_be_disabled(capsys):
    progress = LineProgress()
    progress.disable()
    Trainer(callbacks=[progress], max_epochs=1, **QUIET).fit(BoringModule(), BoringDataModule())
    assert "fit" not in capsys.readouterr().out


def test_parts_below_one_are_refused():
    with pytest.raises(ValueError, match="parts must be >= 1, got 0"):
        LineProgress(0)
