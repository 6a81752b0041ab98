"""DeepSpeed on CPU processes: every path of the command line that is special to it."""

import json

import pytest
import torch
import yaml
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
def test_sharded_runs_equal_unsharded_runs(boring, run, ranks):
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


SHOP = """\
model:
  class_path: SFT
  init_args:
    language_model: {scratch: {hidden_size: 16, num_layers: 1, num_heads: 2, max_length: 128}}
    tuning: {lr: 1.0e-2, warmup_steps: 0}
    ks: [1, 3]
data:
  class_path: RecommendationDataModule
  init_args:
    source: {class_path: Synthetic, init_args: {num_users: 16, num_items: 24, num_events: 6}}
    vocab_size: 300
trainer: {max_epochs: 1, num_sanity_val_steps: 0, enable_model_summary: false}
"""


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("stage", [2, 3])
def test_consolidated_checkpoint_has_all_entries(boring, run, stage):
    """Whose engine states and loops alone are left out; a sharded run goes on from its folder under the stored tokenizer."""
    (boring / "boring.yaml").write_text(SHOP)
    run("fit")
    fit = sharded(stage, 1, ["fit"])
    folder = "runs/boring/version_1/checkpoints/last.ckpt"
    commands = [fit, sharded(stage, 1, ["fit", "--trainer.max_epochs", "2", "--ckpt_path", folder])]
    launch(["-c", RUN_ALL, json.dumps(commands)], ranks=1, cwd=boring, timeout_s=300)
    resumed = yaml.safe_load((boring / "runs/boring/version_2/config_fit.yaml").read_text())
    assert resumed["data"]["init_args"]["tokenizer"] == folder
    cli = run("test", "--ckpt_path", folder)
    plain = torch.load(boring / "runs/boring/version_0/checkpoints/last.ckpt", weights_only=True)
    consolidated = torch.load(boring / "runs/boring/version_1/checkpoints/consolidated-last.ckpt", weights_only=True)
    assert plain.keys() - consolidated.keys() <= {"optimizer_states", "lr_schedulers", "loops"}
    assert not consolidated.keys() - plain.keys()
    assert consolidated["tokenizer"]["digest"] == plain["tokenizer"]["digest"]
    assert consolidated["catalog"]["titles"] == list(cli.model.catalog.titles)
    assert "tokenizers/stored-" in str(cli.model.catalog.vocabulary.tokenizer)


@pytest.mark.parametrize("stage", [2, 3])
def test_fragments_match_the_strategy(boring, resolved, stage):
    chosen = resolved("fit", "--config", "boring.yaml", "--config", f"base/deepspeed_zero{stage}.yaml")["trainer"]["strategy"]
    strategy = DeepSpeedStrategy(**chosen["init_args"])
    assert strategy.zero_stage_3 is (stage == 3)
    assert strategy.exclude_frozen_parameters
