"""Self-play on two ranks is self-play on one: the same rounds, negatives and figures, under DDP, DeepSpeed and FSDP2."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from commands_run import cpu_strategy
from launch import HELPERS, launch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_catalog, tiny_config
from transformers import AutoModelForCausalLM

from malleable.lightning_modules.language.config import build_language_model
from malleable.lightning_modules.language.export import save_language_model

SCRIPT = HELPERS / "self_play_run.py"
RECIPE = ["-m", "malleable", "fit", "--config", "sprec/tiny.yaml"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run folder of ``sprec/tiny.yaml`` in one process."""
    folder = tmp_path_factory.mktemp("alone")
    launch([*RECIPE, *QUIET, "--trainer.devices", "1"], ranks=1, cwd=folder)
    return folder / "runs/sprec/tiny/version_0"


def assert_same_rounds(found: Path, expected: Path) -> None:
    for name in ("round_1", "round_1_pairs", "round_2", "round_2_pairs"):
        ours, theirs = (pq.read_table(folder / f"self_play/{name}.parquet").to_pydict() for folder in (found, expected))
        reference = ours.pop("reference", None), theirs.pop("reference", None)
        assert ours == theirs, name
        if reference[0] is not None:
            torch.testing.assert_close(torch.tensor(reference[0]), torch.tensor(reference[1]), atol=1e-3, rtol=0)


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=0)


@pytest.mark.ddp
@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("fragment", ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_the_recipe_on_two_ranks_equals_one(tmp_path, alone, fragment):
    """The tiny recipe has no dropout, which would differ from rank to rank."""
    launch([*RECIPE, "--config", f"base/{fragment}.yaml", *QUIET, "--trainer.devices", "2", *cpu_strategy(fragment)], cwd=tmp_path, timeout_s=300)
    found = tmp_path / "runs/sprec/tiny/version_0"
    assert_same_rounds(found, alone)
    ours, theirs = (json.loads((folder / "report/metrics.json").read_text()) for folder in (found, alone))
    assert {"train_loss", "val_loss", "test_loss", "test_hr_10", "test_or_ratio_10"} <= theirs.keys()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert_same_weights(found / "model/model.safetensors", alone / "model/model.safetensors")


@pytest.mark.ddp
@pytest.mark.slow
def test_adapter_saved_under_zero3_is_complete(tmp_path):
    """Partitioned while it trains, whole on disk: PEFT loads it and computes what one process computes, with dropout 0."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    save_language_model(build_language_model(tiny_config(), tiny_catalog().vocabulary), base)
    for name, more in (("alone", []), ("zero3", ["--devices", "2", "--strategy", "zero3"])):
        launch([SCRIPT, tmp_path / name, "--lora", base, "--dropout", "0", *more], ranks=2 if more else 1)
    assert_same_rounds(tmp_path / "zero3/run", tmp_path / "alone/run")
    assert_same_weights(tmp_path / "zero3/final.safetensors", tmp_path / "alone/final.safetensors")
    tokens = torch.tensor([[2, 4, 5, 1]])
    logits = []
    for name in ("alone", "zero3"):
        adapter = load_file(tmp_path / name / "run/adapter/adapter_model.safetensors")
        assert len(adapter) == 14
        assert all(value.numel() and value.abs().sum() > 0 for value in adapter.values())
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / name / "run/adapter").eval()
        with torch.no_grad():
            logits.append(loaded(tokens).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
