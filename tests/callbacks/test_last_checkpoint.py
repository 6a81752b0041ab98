import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import interrupted_run
import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from malleable import LastCheckpoint

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Worsening(BoringModule):
    """Its monitored figure is best in the second epoch."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("figure", abs(self.current_epoch - 1.0))


def fit(epochs, monitor="figure", **options):
    checkpoint = ModelCheckpoint("checkpoints", monitor=monitor, save_on_train_epoch_end=True)
    last = LastCheckpoint("checkpoints", **options)
    trainer = Trainer(max_epochs=epochs, callbacks=[checkpoint, last], **QUIET)
    trainer.fit(Worsening(), BoringDataModule())
    return checkpoint


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.mark.parametrize(("epochs", "linked"), [(1, True), (2, True), (3, False), (4, False)])
def test_last_epoch_is_saved_with_any_monitor(epochs, linked):
    checkpoint = fit(epochs)
    last = Path("checkpoints/last.ckpt")
    assert epoch_of(last) == epochs - 1
    assert epoch_of(checkpoint.best_model_path) == min(epochs, 2) - 1
    assert last.is_symlink() == linked
    assert len(list(Path("checkpoints").iterdir())) == 2


def test_without_monitor_the_checkpoint_is_written_once():
    fit(3, monitor=None)
    last = Path("checkpoints/last.ckpt")
    assert last.is_symlink()
    assert not last.readlink().is_absolute()
    assert epoch_of(last) == 2


def test_epochs_between_two_checkpoints():
    fit(5, every_n_epochs=2)
    assert epoch_of("checkpoints/last.ckpt") == 3


@pytest.mark.parametrize("slurm", [False, True])
def test_lightning_handles_slurm_signals(monkeypatch, slurm):
    handlers = {}
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", lambda: slurm)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    LastCheckpoint().on_train_start(SimpleNamespace(world_size=1), None)
    assert handlers.keys() == ({signal.SIGINT} if slurm else {signal.SIGINT, signal.SIGTERM})


def script(*words, timeout=60):
    path = os.pathsep.join([str(Path(interrupted_run.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, interrupted_run.__file__, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoint of a fit that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert script("fit", 0, 0).returncode == 0
    finally:
        os.chdir(before)
    return folder / "checkpoints/last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_interrupted_fit_is_saved_and_resumed(whole, number, status):
    done = script("fit", int(number), 5)
    assert done.returncode == status, done.stderr
    assert "interrupted in epoch 1 after step 6; to resume, call Trainer.fit with ckpt_path='checkpoints/last.ckpt'" in done.stderr
    stored = torch.load("checkpoints/last.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == (1, 6)
    assert script("fit", 0, 0, "checkpoints/last.ckpt").returncode == 0
    resumed, expected = (torch.load(path, weights_only=True) for path in ("checkpoints/last.ckpt", whole))
    assert resumed["global_step"] == expected["global_step"] == 12
    assert all(torch.equal(resumed["state_dict"][name], value) for name, value in expected["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        ("fit", signal.SIGINT, 1),
        ("fit", signal.SIGTERM, 143),
        ("validate", signal.SIGTERM, -signal.SIGTERM),
        ("test", signal.SIGTERM, -signal.SIGTERM),
        ("predict", signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_signal_outside_training_steps_ends_the_run_immediately(command, number, status):
    assert script(command, int(number), -1, timeout=50).returncode == status
