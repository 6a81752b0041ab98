"""alpha-DPO as a module: equal for any accumulation and number of ranks, resumable, and unchanged by evaluation."""

import json

import alpha_dpo_run
import pytest
import torch
from alpha_dpo_run import STATE, make_module, run
from launch import launch
from lightning.pytorch.callbacks import ModelCheckpoint
from reference_run import pairs
from safetensors.torch import load_file
from tiny import tiny_catalog, tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable import DPO, AdaptiveMargin, AlphaDPO, ReferenceCache, SimPO
from malleable.lightning_modules.language.tuning import Tuning


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run with one batch in each step."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, 8)
    return folder / "1x8"


def assert_same(found, expected, weights=True):
    ours, theirs = (load_file(folder / "result.safetensors") for folder in (found, expected))
    assert not weights or ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=0)
    logged, reference = (json.loads((folder / "logged.json").read_text()) for folder in (found, expected))
    assert len(logged) == len(reference) == 12
    for row, other in zip(logged, reference, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_the_margin_adapts_and_statistics_are_logged(whole):
    logged = json.loads((whole / "logged.json").read_text())
    state = load_file(whole / "result.safetensors")
    assert state["statistics.updates"] == 11, "all steps but the first one"
    assert logged[0]["train_gap_z"] == logged[1]["train_gap_z"] == 0
    assert all(row["train_gap_z"] > 0.1 for row in logged[2:])
    assert logged[0]["train_target_margin"] == pytest.approx(0.6)
    assert logged[-1]["train_target_margin_min"] < logged[-1]["train_target_margin"] < logged[-1]["train_target_margin_max"]
    expected = {"loss", "rewards_margins", "rewards_accuracies", "logps_chosen", "reference_chosen", "gap_mean", "gap_std", "gradient_weight"}
    assert {f"train_{name}" for name in (*expected, "tokens_chosen", "tokens_rejected", "margins_dpo", "margins_simpo")} <= set(logged[0])


@pytest.mark.parametrize("size", [4, 2])
def test_accumulated_batches_equal_one(whole, tmp_path, size):
    run(tmp_path, size)
    assert_same(tmp_path / f"1x{size}", whole)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_equal_one(whole, tmp_path):
    launch([alpha_dpo_run.__file__, tmp_path])
    for size in (4, 2):
        assert_same(tmp_path / f"2x{size}", whole)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_equals_one_process(whole, tmp_path, strategy):
    """The statistics follow from the weights of each step."""
    launch([alpha_dpo_run.__file__, tmp_path, strategy])
    for size in (4, 2):
        assert_same(tmp_path / f"2x{size}", whole, weights=False)


def fit(folder, module, ckpt_path=None, **changes):
    saved = ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    settings = {"max_epochs": 2, "limit_val_batches": 0, "callbacks": [ReferenceCache(), saved]}
    trainer = quiet_trainer(folder, **settings | changes)
    trainer.fit(module, TinyData(train=pairs(48), batch_size=8, global_batch_size=8), ckpt_path=ckpt_path)
    return trainer


def test_a_resumed_run_continues_with_the_statistics(tmp_path, whole):
    fit(tmp_path, make_module())
    stored = torch.load(tmp_path / "checkpoints/step=5.ckpt", weights_only=True)["state_dict"]
    assert stored["loss.statistics.updates"] == 4
    module = make_module()
    fit(tmp_path, module, tmp_path / "checkpoints/step=5.ckpt")
    expected = load_file(whole / "result.safetensors")
    for name in STATE:
        torch.testing.assert_close(module.loss.state_dict()[name], expected[name], atol=1e-6, rtol=0)
    for name, weight in module.model.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_evaluation_changes_nothing(tmp_path, whole):
    """Validation after every third step, on pairs."""

    class WithPairs(TinyData):
        def setup(self, stage):
            super().setup(stage)
            self.val_dataset = pairs(7, step=3)

    module = make_module()
    trainer = quiet_trainer(tmp_path, callbacks=[ReferenceCache()], max_epochs=2, val_check_interval=3, enable_checkpointing=False)
    trainer.fit(module, WithPairs(train=pairs(48), batch_size=8, global_batch_size=8))
    assert trainer.callback_metrics["val_rewards_margins"] != 0
    expected = load_file(whole / "result.safetensors")
    for name in STATE:
        assert torch.equal(module.loss.state_dict()[name], expected[name])
    for name, weight in module.model.named_parameters():
        assert torch.equal(weight, expected[name])


def test_without_alpha_it_is_simpo(tmp_path):
    """Bit for bit, whether the rows have a reference or not."""
    trained = []
    for number, (kind, loss, callbacks) in enumerate(
        (
            (AlphaDPO, AdaptiveMargin(2.5, 0.6, alpha=0.0), [ReferenceCache()]),
            (DPO, SimPO(2.5, 0.6), []),
        )
    ):
        torch.manual_seed(0)
        module = kind(tiny_config(), tiny_catalog(), loss=loss, tuning=Tuning(lr=1e-2, warmup_steps=0))
        trainer = quiet_trainer(tmp_path / str(number), max_epochs=1, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=False)
        trainer.fit(module, TinyData(train=pairs(48), batch_size=8))
        trained.append(dict(module.model.named_parameters()))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_pairs_that_never_differ_from_each_other_give_no_nan(tmp_path):
    """The same pair in each row: the standard deviation of the gaps is 0 in every step."""
    row = pairs(3)[2]
    rows = [row | {"sample_id": number} for number in range(32)]
    module = make_module()
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[ReferenceCache()], enable_checkpointing=False)
    trainer.fit(module, TinyData(train=rows, batch_size=8))
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert trainer.callback_metrics["train_gap_z"] == 0
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_a_new_reference_resets_the_statistics(tmp_path):
    """A second fit begins like a first one: the first two steps have no adaptive margin."""
    module = make_module()
    for name in ("a", "b"):
        trainer = quiet_trainer(tmp_path / name, max_steps=1, limit_val_batches=0, callbacks=[ReferenceCache()], enable_checkpointing=False)
        if name == "b":
            module.loss.statistics.average.fill_(0.5)
            module.loss.statistics.updates.fill_(5)
        trainer.fit(module, TinyData(train=pairs(48), batch_size=8))
        assert trainer.callback_metrics["train_gap_z"] == 0
        assert module.loss.statistics.updates == 0
