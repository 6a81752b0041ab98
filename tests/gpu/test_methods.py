"""Edits, self-play and counting baselines on a device: the CPU's results in float32, finite results in half precision. Steps of a Trainer."""

import math

import pytest
import torch
from device_methods import BASELINES, accelerator, baseline_results, edit_changes, self_play_round, sequence_results
from synchronisations import WatchedSteps, refuses_to_wait
from tiny import tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_graph import TinyGraphData
from toy_sequences import ToySequences

from malleable import NFE, SFT, EncoderSettings, SequentialRecommender

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def test_an_edit_equals_that_of_a_cpu(device):
    changes, expected = edit_changes(device), edit_changes(CPU)
    assert changes.keys() == expected.keys()
    for layer, change in expected.items():
        # Target vectors are optimised, which amplifies rounding.
        torch.testing.assert_close(changes[layer], change, rtol=0, atol=0.02 * change.abs().max().item())


def test_an_edit_of_bfloat16_weights(device):
    for change in edit_changes(device, torch.bfloat16).values():
        assert change.isfinite().all()
        assert change.abs().max() > 0


def test_a_round_of_self_play_equals_that_of_a_cpu(device, tmp_path):
    negatives, losses = self_play_round(device, tmp_path / "device")
    expected_negatives, expected_losses = self_play_round(CPU, tmp_path / "cpu")
    assert negatives == expected_negatives
    assert losses == pytest.approx(expected_losses, rel=1e-3)


def test_a_round_of_self_play_in_mixed_precision(device, tmp_path):
    negatives, losses = self_play_round(device, tmp_path, "bf16-mixed")
    assert len(negatives) == 16
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_equals_that_of_a_cpu(name, device, tmp_path):
    items, scores, figures = baseline_results(name, device, tmp_path)
    expected_items, expected_scores, expected_figures = baseline_results(name, CPU, tmp_path)
    assert items == expected_items
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=1e-6)
    assert figures == pytest.approx(expected_figures, rel=1e-6)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "bert4rec", "hstu"])
def test_a_sequential_recommender_trains_as_on_a_cpu(kind, device, tmp_path):
    losses, figures = sequence_results(kind, device, tmp_path / "device")
    expected_losses, expected_figures = sequence_results(kind, CPU, tmp_path / "cpu")
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert figures["test_loss"] == pytest.approx(expected_figures["test_loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "bert4rec", "hstu"])
def test_a_sequential_recommender_in_mixed_precision(kind, device, tmp_path):
    losses, figures = sequence_results(kind, device, tmp_path, "bf16-mixed")
    assert all(math.isfinite(value) for value in (*losses, *figures.values()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["SFT", "NFE", "SequentialRecommender"])
def test_steps_of_a_trainer_do_not_wait_for_the_device(name, device, tmp_path):
    """With logging, clipping, optimizer and scheduler; the first two batches set up what may wait."""
    settings = {"batch_size": 4, "global_batch_size": 8}
    make = {
        "SFT": lambda: (SFT(tiny_config()), TinyData(train=tiny_rows(32), **settings)),
        "NFE": lambda: (NFE(dimension=8), TinyGraphData(**settings)),
        "SequentialRecommender": lambda: (SequentialRecommender(EncoderSettings("hstu", dim=8, max_length=12)), ToySequences(**settings)),
    }
    module, data = make[name]()
    watched = WatchedSteps(lambda: refuses_to_wait(device), first=2)
    options = {"limit_train_batches": 6, "limit_val_batches": 0, "enable_checkpointing": False, "log_every_n_steps": 1000, "gradient_clip_val": 1.0}
    quiet_trainer(tmp_path, accelerator=accelerator(device), max_epochs=1, callbacks=[watched], **options).fit(module, data)
    assert watched.steps == 4
