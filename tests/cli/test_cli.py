import logging
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from boring import BoringModule
from launch import launch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import malleable.cli
from malleable import LineProgress
from malleable.checkpoints import AtomicCheckpointIO, find_checkpoint

CHECKPOINTS = "runs/boring/version_0/checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Run folders


def test_run_writes_to_its_own_folder_only(run, boring, caplog):
    caplog.set_level(logging.INFO, "malleable")
    run("fit")
    assert names(boring) == ["boring.yaml", "runs"]
    assert names(boring / "runs" / "boring" / "version_0") == ["checkpoints", "config_fit.yaml", "hparams.yaml", "metrics.csv"]
    assert caplog.messages[-1] == "run folder: runs/boring/version_0"


def test_each_run_has_a_new_folder(run, boring):
    run("fit")
    run("fit")
    assert names(boring / "runs" / "boring") == ["version_0", "version_1"]


def test_run_folder_with_another_logger(run, boring):
    trainer = run("fit", "--trainer.logger", "lightning.pytorch.loggers.logger.DummyLogger").trainer
    assert [type(logger).__name__ for logger in trainer.loggers] == ["CSVLogger", "DummyLogger"]
    assert {"checkpoints", "metrics.csv"} <= set(names(boring / "runs" / "boring" / "version_0"))


def test_default_root_dir_changes_the_run_folder(run, boring):
    run("fit", "--trainer.default_root_dir", "elsewhere")
    assert (boring / "elsewhere" / "boring" / "version_0" / "metrics.csv").exists()


def test_run_without_config_file_is_named_after_its_model(boring):
    from malleable.cli import run

    words = ["--model", "boring.BoringModule", "--data", "boring.BoringDataModule", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    assert run(["fit", *words]).trainer.log_dir == "runs/BoringModule/version_0"


def test_fit_and_test_may_share_a_folder(run, boring):
    # Both write a configuration; Lightning's own file name would make the second command fail.
    run("fit", "--trainer.logger", "false")
    run("test", "--trainer.logger", "false", "--ckpt_path", next((boring / "checkpoints").glob("epoch*.ckpt")))
    run("fit", "--trainer.logger", "false")
    assert {"config_fit.yaml", "config_test.yaml"} <= set(names(boring))


def test_saved_configuration_reproduces_the_run(run, boring, resolved):
    run("fit", "--model.goal", 3)
    path = boring / "runs" / "boring" / "version_0" / "config_fit.yaml"
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["init_args"]["goal"] == 3.0
    assert resolved("fit", "--config", path) == saved


# Checkpoints


def test_each_epoch_is_saved_and_last_ckpt_exists(run, boring):
    run("fit", "--trainer.max_epochs", 2, "--checkpoint.save_top_k", -1)
    assert names(boring / CHECKPOINTS) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]


def test_last_epoch_is_saved_in_addition_to_the_monitored_one(run, boring):
    run("fit", "--trainer.max_epochs", 3, "--checkpoint.monitor", "val_loss", "--checkpoint.mode", "max")
    assert names(boring / CHECKPOINTS) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load(boring / CHECKPOINTS / "last.ckpt", weights_only=True)["epoch"] == 2


def test_saving_the_last_epoch_can_be_disabled(run, boring):
    run("fit", "--checkpoint.save_last", "null")
    assert names(boring / CHECKPOINTS) == ["epoch=0-step=4.ckpt"]


def test_an_interrupted_fit_prints_the_command_that_resumes(run, boring, caplog):
    caplog.set_level(logging.INFO, "malleable")
    send = "  callbacks+:\n  - {class_path: interrupted_run.Send, init_args: {number: 2, step: 6}}\n"
    (boring / "boring.yaml").write_text((boring / "boring.yaml").read_text() + send)
    with pytest.raises(SystemExit):
        run("fit", "--trainer.max_epochs", 2)
    (message,) = (message for message in caplog.messages if message.startswith("interrupted in epoch 1 after step 7; to resume, run: "))
    program, *words = shlex.split(message.partition("run: ")[2])
    assert program == "malleable"
    assert words[-2:] == ["--ckpt_path", f"{CHECKPOINTS}/last.ckpt"]
    assert malleable.cli.run(words).trainer.global_step == 8


def test_temporary_checkpoint_is_in_the_same_folder(run, boring, monkeypatch):
    """The folder for temporary files may be another file system, where the last step of Lightning's save is a copy."""
    monkeypatch.setenv("TMPDIR", str(boring / "missing"))
    assert isinstance(run("fit").trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert (boring / CHECKPOINTS / "last.ckpt").exists()


def test_ckpt_path_best(run):
    callback = run("fit", "--checkpoint.monitor", "val_loss", "--checkpoint.filename", "{val_loss:.2f}").trainer.checkpoint_callback
    assert "val_loss=" in callback.best_model_path


def test_checkpoints_can_be_disabled(run, boring):
    run("fit", "--trainer.enable_checkpointing", "false")
    assert not (boring / CHECKPOINTS).exists()


def test_a_checkpoint_callback_of_the_configuration_replaces_ours(run):
    trainer = run("fit", "--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k", 0).trainer
    assert [callback.save_top_k for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)] == [0]


def test_a_checkpoint_is_written_once(run, boring):
    """The last one is a link, which holds in a copy of the run's folder, too."""
    run("fit")
    last = boring / CHECKPOINTS / "last.ckpt"
    assert last.is_symlink()
    assert not last.readlink().is_absolute()
    copied = shutil.copytree(boring / "runs", boring / "copies", symlinks=True)
    (copied / "boring/version_0").rename(copied / "boring/version_7")
    found = find_checkpoint("last", copied / "boring")
    assert found == str(copied / "boring/version_7/checkpoints/last.ckpt")
    assert torch.load(found, weights_only=True)["epoch"] == torch.load(last, weights_only=True)["epoch"]


def test_resuming_the_last_run_gives_the_uninterrupted_weights(run):
    run("fit", "--trainer.max_epochs", 2)
    run("fit", "--trainer.max_epochs", 1)
    run("fit", "--trainer.max_epochs", 2, "--ckpt_path", "last")
    whole, resumed = (weights(f"runs/boring/version_{number}/checkpoints/last.ckpt") for number in (0, 2))
    assert equal(whole, resumed)


@pytest.mark.parametrize(("terminal", "kind"), [(True, TQDMProgressBar), (False, LineProgress)])
def test_default_progress_bar_can_be_replaced(boring, monkeypatch, terminal, kind):
    from malleable.cli import run

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    words = ["fit", "--config", "boring.yaml", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    assert isinstance(run(words).trainer.progress_bar_callback, kind)
    own = run([*words, "--trainer.callbacks", "TQDMProgressBar", "--trainer.callbacks.refresh_rate", "7"]).trainer
    assert own.progress_bar_callback.refresh_rate == 7


def test_run_of_unlimited_length_is_refused(run, boring):
    with pytest.raises(MisconfigurationException, match=r"the length of this run is not limited: max_epochs is -1.*SelfPlayLoop"):
        run("fit", "--trainer.max_epochs", -1)
    assert run("fit", "--trainer.max_epochs", -1, "--trainer.max_steps", 2).trainer.global_step == 2


# Testing after training


def test_best_checkpoint_is_tested_after_fit(run):
    # The edit is neither in the last checkpoint nor in what Lightning would reload.
    metrics = run("fit", "--test_after_fit", "--trainer.callbacks", "boring.EditAfterFit").trainer.callback_metrics
    assert metrics["test_mean_output"] == 7.0


def test_without_checkpoints_the_weights_in_memory_are_tested(run):
    saved, unsaved = (run("fit", "--test_after_fit", "--trainer.enable_checkpointing", switch).trainer for switch in ("true", "false"))
    assert saved.callback_metrics["test_loss"] == unsaved.callback_metrics["test_loss"]


def test_fit_does_not_test_by_default(run):
    assert "test_loss" not in run("fit", "--test_after_fit", "false").trainer.callback_metrics


# Untrained models


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_untrained_model_is_refused_before_it_is_built(run, command, monkeypatch):
    monkeypatch.setattr(BoringModule, "__init__", lambda self: pytest.fail("the model was made"))
    with pytest.raises(MisconfigurationException, match=rf"`{command}` would use BoringModule .* --ckpt_path .* --allow_untrained"):
        run(command)


@pytest.mark.parametrize("word", [("--allow_untrained",), ("--allow_untrained", "true"), ("--model", "boring.TrainingFree")])
def test_untrained_model_is_tested_with_allow_untrained(run, word):
    assert "test_loss" in run("test", *word).trainer.callback_metrics


def test_trained_model_is_tested(run):
    trained = run("fit").trainer.callback_metrics["val_loss"]
    assert run("test", "--ckpt_path", "last").trainer.callback_metrics["test_loss"] == trained


# Checkpoint against command line


def test_given_values_override_the_checkpoint(run, caplog):
    caplog.set_level(logging.INFO, "malleable")
    run("fit", "--model.width", 3)
    cli = run("test", "--ckpt_path", "last", "--model.goal", 5)
    assert cli.model.goal == 5.0  # given here
    assert cli.model.width == 3  # given nowhere here: the checkpoint's
    (line,) = [message for message in caplog.messages if "values of the recipe and the command line override" in message]
    assert line.endswith(f"{CHECKPOINTS}/last.ckpt: goal 5.0 (checkpoint: 2.0)")


def test_values_of_a_checkpoint_of_another_class_are_ignored(run):
    run("fit", "--model.width", 2, "--model.goal", 9)
    cli = run("test", "--ckpt_path", f"{CHECKPOINTS}/last.ckpt", "--model", "boring.TrainingFree")
    assert cli.model.goal == 1.0


def test_lightning_classes_run_by_import_path(boring):
    from malleable.cli import run

    here = "lightning.pytorch.demos.boring_classes"
    words = ["--model", f"{here}.BoringModel", "--data", f"{here}.BoringDataModule", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    assert run(["fit", *words]).trainer.state.finished


# Several processes


@pytest.mark.ddp
def test_two_processes_give_the_same_weights_as_one(run, boring):
    words = ("--data.batch_size", 2, "--data.global_batch_size", 8, "--test_after_fit")
    alone = run("fit", *words)
    two = ["--config", "base/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.enable_progress_bar", "false"]
    launch(["-m", "malleable", "fit", "--config", "boring.yaml", *two, *map(str, words)], cwd=boring)
    first, second = (weights(f"runs/boring/version_{number}/checkpoints/last.ckpt") for number in (0, 1))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert alone.trainer.global_step == 2
    assert names(boring / "runs" / "boring") == ["version_0", "version_1"]
