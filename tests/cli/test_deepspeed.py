"""DeepSpeed on CPU processes: every path of the command line that is special to it."""

import json

import pytest
import torch
import yaml
from launch import launch
from lightning.pytorch.strategies import DeepSpeedStrategy

CPU = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
# Two batches of four rows make a step of eight, on one process or on two.
DATA = ["--data.batch_size", "2", "--data.global_batch_size", "8", "--trainer.max_epochs", "2"]
ADAMW = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.1", "--model.optimizer.weight_decay", "0.5"]

pytestmark = pytest.mark.slow


def strategy(stage):
    arguments = {"stage": stage, "exclude_frozen_parameters": True}
    return ["--trainer.strategy", json.dumps({"class_path": "cpu_deepspeed.CPUDeepSpeedStrategy", "init_args": arguments})]


def command(folder, name, *words, ranks=1):
    launch(["-m", "malleable", name, "--config", "boring.yaml", *CPU, "--trainer.devices", str(ranks), *words], ranks=ranks, cwd=folder)


def metrics(folder, run):
    """Return the last value of each column that a run has logged."""
    header, *rows = [line.split(",") for line in (folder / "runs" / "boring" / f"version_{run}" / "metrics.csv").read_text().splitlines()]
    return {name: float(value) for row in rows for name, value in zip(header, row, strict=True) if value}


@pytest.mark.ddp
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_sharded_training_equals_plain_training(boring, run, stage, ranks):
    # Accumulation, weight decay of matrices alone, and the test after training are where DeepSpeed is prone to differ.
    run("fit", "--test_after_fit", *DATA, *ADAMW)
    command(boring, "fit", "--test_after_fit", *DATA, *ADAMW, *strategy(stage), ranks=ranks)
    plain, sharded = metrics(boring, 0), metrics(boring, 1)
    assert plain["test_loss"] == plain["val_loss"]
    for name in ("val_loss", "test_loss", "test_mean_output"):
        assert sharded[name] == pytest.approx(plain[name], abs=1e-5), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_checkpoint_is_measured_anywhere(boring, run, stage):
    command(boring, "fit", "--test_after_fit", "--model.width", "3", *strategy(stage))
    run("test", "--ckpt_path", "last")  # on one plain device, the model's width taken from the checkpoint
    command(boring, "test", "--ckpt_path", "runs/boring/version_0/checkpoints/last.ckpt", *strategy(stage))
    first = metrics(boring, 0)
    assert metrics(boring, 1)["test_loss"] == metrics(boring, 2)["test_loss"] == first["test_loss"]
    file = torch.load(boring / "runs/boring/version_0/checkpoints/consolidated-last.ckpt", weights_only=True)
    assert file["state_dict"]["layer.weight"].shape == (3, 4)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_fragments_fit_the_strategy(boring, resolved, stage):
    chosen = resolved("fit", "--config", "boring.yaml", "--config", f"base/deepspeed_zero{stage}.yaml")["trainer"]["strategy"]
    assert chosen["init_args"]["stage"] == stage
    assert chosen["init_args"]["exclude_frozen_parameters"] is True
    assert DeepSpeedStrategy(**yaml.safe_load(yaml.safe_dump(chosen["init_args"]))).exclude_frozen_parameters
