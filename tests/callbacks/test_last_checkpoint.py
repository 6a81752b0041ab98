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
from launch import free_port
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_both_signals_are_handled(monkeypatch, world_size):
    """Also on several ranks and under SLURM, where Lightning would end the run without a checkpoint at SIGTERM."""
    handlers = {}
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.setdefault(number, handler))
    LastCheckpoint().on_train_start(SimpleNamespace(world_size=world_size), None)
    assert handlers.keys() == {signal.SIGINT, signal.SIGTERM}


def test_folder_is_replaced_by_a_complete_one(tmp_path, monkeypatch):
    """A process that is killed while a sharded strategy writes leaves the earlier folder."""
    last = LastCheckpoint(tmp_path)
    path = tmp_path / "last.ckpt"

    def save(filepath, weights_only):
        assert filepath != str(path) or not path.exists()
        Path(filepath).mkdir()
        (Path(filepath) / "shard").write_text(str(trainer.global_step))
        if trainer.global_step == 3:
            raise KeyboardInterrupt

    strategy = SimpleNamespace(barrier=lambda name: None, broadcast=lambda value: value)
    trainer = SimpleNamespace(
        global_step=0, is_global_zero=True, strategy=strategy, checkpoint_callbacks=[last], loggers=[], save_checkpoint=save, callbacks=[last]
    )
    for trainer.global_step in (1, 2):
        last._save_checkpoint(trainer, str(path))
        assert last._last_checkpoint_saved == str(path)
    trainer.global_step = 3
    with pytest.raises(KeyboardInterrupt):
        last._save_checkpoint(trainer, str(path))
    assert (path / "shard").read_text() == "2"
    assert list(tmp_path.iterdir()) == [path]


def script(*words, timeout=60, launcher=(), **variables):
    path = os.pathsep.join([str(Path(interrupted_run.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, *launcher, interrupted_run.__file__, *map(str, words)]
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


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(
    ("ranks", "number", "step", "reached"),
    [
        ("0", signal.SIGTERM, 5, (1, 6)),  # the process that the user has started
        ("1", signal.SIGTERM, 5, (1, 6)),
        ("01", signal.SIGTERM, 5, (1, 6)),  # as SLURM and torchrun do
        ("01", signal.SIGINT, 5, (1, 6)),  # Ctrl-C
        ("01", signal.SIGTERM, -2, (0, 4)),  # in the validation; the checkpoint is that of the epoch
    ],
)
def test_signal_to_ranks_leaves_one_complete_checkpoint(whole, ranks, number, step, reached):
    done = script("fit", int(number), step, SIGNALLED=ranks, timeout=100)
    assert done.returncode == (1 if number == signal.SIGINT else 128 + number), done.stderr
    assert f"interrupted in epoch {reached[0]} after step {reached[1]}; to resume" in done.stderr
    assert [path.name for path in Path("checkpoints").iterdir()] == ["last.ckpt"]
    stored = torch.load("checkpoints/last.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == reached
    assert script("fit", 0, 0, "checkpoints/last.ckpt", SIGNALLED="", timeout=100).returncode == 0
    resumed, expected = (torch.load(path, weights_only=True) for path in ("checkpoints/last.ckpt", whole))
    assert resumed["global_step"] == expected["global_step"] == 12
    assert all(torch.allclose(resumed["state_dict"][name], value, atol=1e-6) for name, value in expected["state_dict"].items())


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_outside_steps_ends_all_ranks(number):
    done = script("fit", int(number), -1, SIGNALLED="0", timeout=100)
    assert done.returncode == (1 if number == signal.SIGINT else 128 + number), done.stderr
    assert "interrupted in epoch 0; nothing was saved; to start again, call Trainer.fit" in done.stderr


@pytest.mark.slow
@pytest.mark.ddp
def test_signal_to_torchrun_leaves_one_complete_checkpoint():
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = script("fit", int(signal.SIGTERM), 5, launcher=launcher, SIGNALLED="agent", timeout=100)
    assert done.returncode != 0
    assert "interrupted in epoch 1 after step 6; to resume" in done.stderr
    stored = torch.load("checkpoints/last.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == (1, 6)
