"""DeepSpeed on CPU processes: every path of the command line that is special to it."""

import json

import pytest
import torch
from launch import launch
from lightning.pytorch.strategies import DeepSpeedStrategy

# Two or four batches of two rows make a step of eight. Accumulation, weight decay of matrices alone, sizes taken from the
# checkpoint, and the test after training are where sharded runs are prone to differ.
WORDS = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.1", "--model.optimizer.weight_decay", "0.5"]
WORDS += ["--data.batch_size", "2", "--data.global_batch_size", "8"]
FIT = ["fit", *WORDS, "--model.width", "3", "--trainer.max_epochs", "2", "--test_after_fit"]
RUN_ALL = "import json, sys; from malleable.cli import run; [run(words) for words in json.loads(sys.argv[1])]"


def sharded(stage, ranks, words):
    quiet = ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--trainer.enable_progress_bar", "false"]
    strategy = {"class_path": "cpu_deepspeed.CPUDeepSpeedStrategy", "init_args": {"stage": stage, "exclude_frozen_parameters": True}}
    return [words[0], "--config", "boring.yaml", *quiet, "--trainer.strategy", json.dumps(strategy), *words[1:]]


def metrics(folder, version):
    """Return the last value of each column that a run has logged."""
    header, *rows = [line.split(",") for line in (folder / f"runs/boring/version_{version}/metrics.csv").read_text().splitlines()]
    return {name: float(value) for row in rows for name, value in zip(header, row, strict=True) if value}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_runs_equal_plain_ones(boring, run, ranks):
    run(*FIT)
    plain = metrics(boring, 0)
    commands = [
        sharded(2, ranks, FIT),
        sharded(2, ranks, ["test", "--ckpt_path", "runs/boring/version_1/checkpoints/last.ckpt"]),
        sharded(3, ranks, FIT),
        sharded(3, ranks, ["test", "--ckpt_path", "runs/boring/version_3/checkpoints/last.ckpt"]),
    ]
    launch(["-c", RUN_ALL, json.dumps(commands)], ranks=ranks, cwd=boring)
    run("test", "--ckpt_path", "runs/boring/version_1/checkpoints/last.ckpt")  # on one plain device
    run("test", "--ckpt_path", "runs/boring/version_3/checkpoints/last.ckpt")
    for version in range(1, 7):
        found = metrics(boring, version)
        for name in ("test_loss", "test_mean_output"):
            assert found[name] == pytest.approx(plain[name], abs=1e-5), (version, name)
    consolidated = torch.load(boring / "runs/boring/version_3/checkpoints/consolidated-last.ckpt", weights_only=True)
    assert consolidated["state_dict"]["layer.weight"].shape == (3, 4)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_fragments_fit_the_strategy(boring, resolved, stage):
    chosen = resolved("fit", "--config", "boring.yaml", "--config", f"base/deepspeed_zero{stage}.yaml")["trainer"]["strategy"]
    strategy = DeepSpeedStrategy(**chosen["init_args"])
    assert strategy.zero_stage_3 is (stage == 3)
    assert strategy.exclude_frozen_parameters
